"""Batch norm whose statistics are those of all ranks, on a CPU as on a GPU.

Torch's SyncBatchNorm refuses tensors of a CPU. Legend: N rows of this rank, C features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Standardise(torch.autograd.Function):
    """x_hat of all ranks' rows; one collective forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, C], [C], [C], []
        """x_hat, mean, variance over all rows, their number. x: [N, C] fp32 or fp64."""
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
    """Mean, sum of squares about it, and number of rows; zeros of none."""
    count = rows.new_full((1,), rows.shape[0])
    mean = rows.sum(0) / count.clamp_min(1)
    return torch.cat([mean, (rows - mean).square().sum(0), count])


def join_moments(parts: Tensor) -> Tensor:  # [K, 2 C + 1] -> [2 C + 1]
    """Moments of all rows together.

    Each part's sum of squares is about its own mean, and moved to the common one: the difference of
    two large sums would lose the variance of features far from zero.
    """
    means, squares = parts[:, :-1].chunk(2, dim=1)
    counts = parts[:, -1:]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp_min(1)
    return torch.cat([mean, (squares + counts * (means - mean).square()).sum(0), total])


def moments_of_ranks(
    own: Tensor,  # [2 C + 1]
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C], []
    """Mean, variance over the count, and count of all ranks' rows."""
    if group is not None:
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_ranks, own, group=group)
        own = join_moments(torch.stack(of_ranks))
    mean, squares = own[:-1].chunk(2)
    return mean, squares / own[-1].clamp_min(1), own[-1]


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the last dimension: [N, ..., C] -> the same, in the dtype of the input.

    In training the mean and variance are those of the rows of all ranks of `process_group`, each
    with as many as it has; None: of this process alone. Gradients are those of the sum of all
    ranks' losses, so that their average over the ranks is that of one process with all rows.
    Statistics in fp32 (fp64 for fp64). The state dict is BatchNorm1d's.

    With a process group: not for torch.compile, and a single row in all gives the bias, where
    BatchNorm1d raises.
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
