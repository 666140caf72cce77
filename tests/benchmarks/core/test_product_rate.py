"""The products whose rate a step is held to are right, by each library, and the faster counts."""

from __future__ import annotations

import pytest
import torch

from m3i_fast.benchmarks.core import product_rate
from m3i_fast.benchmarks.core.product_rate import rate_gflop_s, square_products


def test_each_library_multiplies_the_same_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    draw = torch.randn

    def kept(*size: int, **how: object) -> torch.Tensor:
        drawn.append(draw(*size, **how))  # type: ignore[call-overload]
        return drawn[-1]

    monkeypatch.setattr(product_rate, "SQUARE", 192)
    monkeypatch.setattr(torch, "randn", kept)
    products = square_products(torch.device("cpu"), torch.float32)
    a, b = drawn
    expected = a.double() @ b.double()
    assert products.keys() == ({"default", "oneDNN"} if product_rate.by_onednn() else {"default"})
    for product in products.values():
        torch.testing.assert_close(product().double(), expected, rtol=0, atol=1e-4)


def test_the_faster_library_counts() -> None:
    assert rate_gflop_s({"default": 200.0, "oneDNN": 100.0}) == pytest.approx(171.798692)
