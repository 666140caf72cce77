"""Rows of unit length against torch's own, in values, gradients and operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.objectives.row_statistics import unit_rows


class Calls(TorchDispatchMode):
    """Count operators that compute."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def drawn(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    rows = torch.randn(5, 7, dtype=torch.float64) * torch.logspace(-8, 8, 5)[:, None]
    return rows.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_rows_are_torchs(dtype: torch.dtype) -> None:
    weights = torch.randn(5, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (unit_rows, lambda x: F.normalize(x, dim=-1)):
        x = drawn(dtype)
        unit = function(x)
        (unit * weights).sum().backward()
        assert x.grad is not None
        results.append((unit.detach(), x.grad * x.detach().norm(dim=-1, keepdim=True)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(unit_rows, drawn(torch.float64)[:3] * 1e8)


def test_a_row_of_zeros_is_torchs() -> None:
    grads = []
    for function in (unit_rows, lambda x: F.normalize(x, dim=-1)):
        x = torch.zeros(2, 3, requires_grad=True)
        function(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


def test_unit_rows_take_half_the_operators() -> None:
    counts = []
    for function in (unit_rows, lambda x: F.normalize(x, dim=-1)):
        x = drawn(torch.float32)
        with Calls() as calls:
            function(x).sum().backward()
        counts.append(calls.count)
    assert 2 * counts[0] < counts[1] + 4  # the sum and its gradient are in both
