"""Targets and losses over prototypes against formulas in fp64 and numbers of 50 digits.

Legend: N rows, K prototypes.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m3i_fast.objectives.losses import distillation
from m3i_fast.ops import boltzmann_rows
from tests.objectives.losses.oracles import balanced, draw, probabilities

N, K = 24, 16


def mean_entropy(logits: Tensor, *, temperature: float) -> Tensor:
    axes = torch.eye(logits.shape[1], dtype=logits.dtype)
    return distillation.mean_entropy(logits, axes, temperature=temperature)


def sinkhorn_knopp(logits: Tensor, **options: Any) -> Tensor:  # [N, K]
    return probabilities(balanced(logits, **options))


def test_mean_entropy_is_the_divergence_from_even_use() -> None:
    logits = draw(N, K)
    share = (logits / 0.3).exp()
    share = (share / share.sum(1, keepdim=True)).mean(0)
    expected = float((share * (share * K).log()).sum())
    assert float(mean_entropy(logits, temperature=0.3)) == pytest.approx(expected)
    even = torch.eye(K).repeat(2, 1) * 50
    assert float(mean_entropy(even, temperature=0.1)) == pytest.approx(0, abs=1e-6)
    one = even[:1].repeat(3, 1).requires_grad_()  # other prototypes' shares are 0 in fp32
    value = mean_entropy(one, temperature=0.1)
    assert value.item() == pytest.approx(math.log(K))
    assert torch.autograd.grad(value, one)[0].isfinite().all()


@pytest.mark.parametrize("block", [1, 2, 7, N])
def test_mean_entropy_is_the_same_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and both gradients are those of the expression that has all logits."""
    monkeypatch.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", 2 * block * K * 8)
    leaves = [draw(n, 5, seed=n).requires_grad_() for n in (N, K)]
    share = (leaves[0] @ leaves[1].T / 0.3).softmax(1).mean(0)
    expected = (share * (share * K).log()).sum()
    got = distillation.mean_entropy(*leaves, temperature=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (got, expected)),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_prototypes_and_features_of_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected shapes \[N, E\] and \[K, E\], got \[24, 5"):
        distillation.mean_entropy(draw(N, 5), draw(K, 4), temperature=0.1)
    with pytest.raises(ValueError, match="temperature"):
        distillation.mean_entropy(draw(N, 5), draw(K, 5), temperature=0.0)


# ---- Sinkhorn-Knopp ------------------------------------------------------------------------------


def exact_sinkhorn(logits: Tensor, temperature: float, num_iterations: int) -> list[list[float]]:
    """The exponential form of SwAV, in numbers of 50 digits whose exponents have no end."""
    rows, columns = logits.shape
    with mpmath.workdps(50):
        q = mpmath.matrix(logits.tolist()).apply(lambda x: mpmath.exp(x / temperature))
        for _ in range(num_iterations):
            for j in range(columns):
                q[:, j] = q[:, j] / (columns * sum(q[i, j] for i in range(rows)))
            for i in range(rows):
                q[i, :] = q[i, :] / sum(q[i, j] for j in range(columns))
        return [[float(q[i, j]) for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("temperature", [1.0, 0.04, 1e-4])
def test_sinkhorn_is_the_exponential_form_at_any_temperature(temperature: float) -> None:
    logits = 30 * draw(9, 5)  # exp(logits / 1e-4) would need an exponent of a million
    expected = torch.tensor(exact_sinkhorn(logits, temperature, 3), dtype=torch.float64)
    got = sinkhorn_knopp(logits, temperature=temperature, num_iterations=3)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 9),
    size=st.sampled_from([1e-3, 1.0, 1e3, 1e6]),
    temperature=st.sampled_from([1e-4, 0.04, 1.0]),
    seed=st.integers(0, 99),
)
def test_sinkhorn_assigns_every_row_whole(
    rows: int, columns: int, size: float, temperature: float, seed: int
) -> None:
    logits = (size * draw(rows, columns, seed=seed)).float()
    q = sinkhorn_knopp(logits, temperature=temperature)
    assert (q >= 0).all()
    torch.testing.assert_close(q.sum(1), torch.ones(rows), atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 99), temperature=st.sampled_from([0.04, 0.5]))
def test_sinkhorn_does_not_see_what_all_rows_or_one_row_have_in_common(
    seed: int, temperature: float
) -> None:
    logits = draw(8, 5, seed=seed)
    q = sinkhorn_knopp(logits, temperature=temperature, num_iterations=200)
    torch.testing.assert_close(q.sum(0), torch.full((5,), 8 / 5).double(), atol=0.05, rtol=0)
    of_columns = sinkhorn_knopp(logits + 7 * draw(5, seed=1), temperature=temperature)
    once = sinkhorn_knopp(logits, temperature=temperature)
    torch.testing.assert_close(of_columns, once)
