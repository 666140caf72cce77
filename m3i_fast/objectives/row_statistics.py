"""Statistics over the rows of a batch, in one process or over the ranks of a process group.

With a `process_group` each rank passes its own rows, in any number, and gets the statistic of all
rows. Gradients are those of the sum of all ranks' losses: a parameter's gradient averaged over the
ranks, as DDP and FSDP do, is that of one process with all rows. An all-reduce whose backward is not
reduced gives 1 / ranks of it (lightly #1977, open_clip #616). Not for torch.compile.

Legend: N rows of this rank, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 1e-12  # rows that are shorter are divided by it, as by F.normalize

P = ParamSpec("P")
R = TypeVar("R")


def wide(x: Tensor) -> Tensor:
    """Cast to fp32; fp64 is kept, so that gradients can be checked in it."""
    return x if x.dtype == torch.float64 else x.float()


class _UnitRows(torch.autograd.Function):
    """Rows over their lengths, whose gradient takes five operators where torch's takes fourteen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        divisor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST)
        unit = x / divisor
        ctx.save_for_backward(unit, divisor)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, divisor = ctx.saved_tensors
        along = (grad * unit).sum(-1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(divisor)


def unit_rows(x: Tensor) -> Tensor:  # [..., D] fp32 or fp64 -> [..., D]
    """Scale rows to unit length, as `F.normalize`; differentiable once.

    A row of zeros stays zero, with the gradient over 1e-12.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        unit: Tensor = _UnitRows.apply(x)
        return unit
    return F.normalize(x, dim=-1)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that it runs with autocast off, its products in their inputs' dtype."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next(tensors).device.type
        if not torch.is_autocast_enabled(device):  # no region in an exported graph
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


class _SumOverRanks(torch.autograd.Function):
    """An all-reduced sum, whose gradient is all-reduced as well."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(partial: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce a tensor of the same shape and dtype on every rank by its sum; differentiable."""
    if process_group is None:
        return partial
    return _SumOverRanks.apply(partial, process_group)


def ratio_over_ranks(
    part: Tensor,  # [], a floating type
    whole: Tensor,  # [], as a count
    process_group: dist.ProcessGroup | None,
) -> Tensor:  # []
    """Divide the sums of two numbers over ranks, of which some may have none; NaN for 0 / 0."""
    sums = torch.stack([part, whole.to(part.dtype)])
    above, below = sum_over_ranks(sums, process_group).unbind()
    return above / below


def num_rows(rows: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:  # [N, ...] -> []
    """Count the rows of all ranks, in the dtype and on the device of `rows`."""
    return sum_over_ranks(rows.new_full((), rows.shape[0]), process_group)


def mean_row(rows: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Average over the rows of all ranks: [N, ...] fp32 or fp64 -> [...]; NaN without any row."""
    return sum_over_ranks(rows.sum(0), process_group) / num_rows(rows, process_group)


def outer_mean(
    a: Tensor,  # [N, D] fp32 or fp64
    b: Tensor,  # [N, E]
    process_group: dist.ProcessGroup | None,
) -> Tensor:  # [D, E]
    """Compute mean_n a_n b_n^T over the rows of all ranks."""
    return sum_over_ranks(a.T @ b, process_group) / num_rows(a, process_group)


def quadratic_form(rows: Tensor, matrix: Tensor) -> Tensor:  # [N, D], [D, D] -> [N]
    """Compute z_n^T M z_n of each row, without the [N, N] matrix Z M Z^T."""
    return ((rows @ matrix) * rows).sum(-1)
