"""Batch norm with statistics all-reduced over the ranks, on a CPU as on a GPU.

torch's SyncBatchNorm refuses CPU tensors. Legend: N rows of this rank, C features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Standardise(torch.autograd.Function):
    """Normalisation by the statistics of all ranks' rows: one collective in each direction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, C], [C], [C], []
        """Return x_hat, and the mean, variance and number of all rows. x: [N, C] fp32 or fp64."""
        mean, variance, count = moments_of_ranks(own_moments(x), group)
        inverse_std = (variance + eps).rsqrt()
        x_hat = (x - mean) * inverse_std
        ctx.save_for_backward(x_hat, inverse_std, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return x_hat, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        x_hat, inverse_std, count = ctx.saved_tensors
        sums = torch.stack([grad.sum(0), (grad * x_hat).sum(0)])
        dist.all_reduce(sums, group=ctx.group)
        mean_grad, mean_product = sums / count
        return inverse_std * (grad - mean_grad - x_hat * mean_product), None, None


def own_moments(rows: Tensor) -> Tensor:  # [N, C] -> [2 C + 1]
    """Return the mean, the sum of squares about it, and the number of rows; zeros for no row."""
    count = rows.new_full((1,), rows.shape[0])
    mean = rows.sum(0) / count.clamp_min(1)
    return torch.cat([mean, (rows - mean).square().sum(0), count])


def join_moments(moments: Tensor) -> Tensor:  # [K, 2 C + 1] -> [2 C + 1]
    """Merge the moments of K groups of rows into those of all their rows.

    The sum of squares of each group is about the group's own mean and is shifted to the common one:
    the difference of two large sums would lose the variance of features far from zero.
    """
    means, squares = moments[:, :-1].chunk(2, dim=1)
    counts = moments[:, -1:]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp_min(1)
    return torch.cat([mean, (squares + counts * (means - mean).square()).sum(0), total])


def moments_of_ranks(
    own: Tensor,  # [2 C + 1]
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C], []
    """Return the mean, the biased variance and the number of all ranks' rows; own: `own_moments`.

    Gathers 2 C + 1 numbers of each rank of `group`; None: the rows of this process alone.
    """
    if group is not None:
        gathered = own.new_empty(dist.get_world_size(group) * len(own))
        dist.all_gather_into_tensor(gathered, own, group=group)
        own = join_moments(gathered.view(-1, len(own)))
    mean, squares = own[:-1].chunk(2)
    return mean, squares / own[-1].clamp_min(1), own[-1]


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the last dimension: [N, ..., C] -> the same shape and dtype.

    In training the mean and variance are those of the rows of all ranks of `process_group`, which
    may hold different numbers of rows; None: of this process alone. Gradients are those of the sum
    of all ranks' losses, so that their average over the ranks is the gradient of one process with
    all rows. Statistics are fp32 (fp64 for fp64). The state dict is that of BatchNorm1d.

    With a process group torch.compile is not supported, and a single row over all ranks gives the
    bias, where BatchNorm1d raises. Raises ValueError for an input of another width.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() < 2 or input.shape[-1] != self.num_features:
            raise ValueError(
                f"input: expected [N, ..., {self.num_features}], got {list(input.shape)}"
            )
        rows = input.flatten(0, -2)
        if self.process_group is None or not self.training:
            return super().forward(rows).view_as(input)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        x_hat, mean, variance, count = _Standardise.apply(wide, self.eps, self.process_group)
        self._track(mean, variance * count / (count - 1).clamp_min(1))
        if self.affine:
            x_hat = x_hat * self.weight.to(x_hat.dtype) + self.bias.to(x_hat.dtype)
        return x_hat.to(input.dtype).view_as(input)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        for running, value in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(value.to(running.dtype), self.momentum)
