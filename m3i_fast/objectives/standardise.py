"""Standardise each channel of dense targets, so that what all cells have in common is no target.

Legend: N rows of this rank, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.objectives.statistics import wide

MOMENTUM = 0.9  # of the running statistics, as DINO's centre has it
EPS = 1e-5  # added to a variance


class Standardise(nn.Module):
    """(z - mean) / std of each channel, without gradient; both are of the rows of all ranks.

    running: of the rows of earlier steps, so that a target does not depend on the other rows of its
    batch. Rows seen in training count from the next `fold` on. Bias-corrected: the first step's
    statistics are the first running ones; before them targets are left as they are.
    batch: of the rows of the call.
    """

    mean: Tensor  # [C] fp32
    variance: Tensor  # [C] fp32
    num_folds: Tensor  # [] int64
    seen: Tensor  # [2 C + 1] fp32, moments of the rows since the last fold

    def __init__(
        self, dim: int, over: Literal["running", "batch"], process_group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.over, self.process_group = over, process_group
        if over == "running":
            self.register_buffer("mean", torch.empty(dim))
            self.register_buffer("variance", torch.empty(dim))
            self.register_buffer("num_folds", torch.empty((), dtype=torch.int64))
            self.register_buffer("seen", torch.empty(2 * dim + 1), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every buffer, as after `to_empty`."""
        for buffer in self.buffers():
            buffer.zero_()
        if self.over == "running":
            self.variance.fill_(1.0)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:  # [..., C] -> [..., C] in the dtype of z
        rows = wide(z)
        if self.over == "batch":
            mean, variance, _ = self._of_all_ranks(_moments(rows.flatten(0, -2)))
        else:
            mean, variance = self.mean, self.variance
            if self.training:
                self.seen.copy_(_joined(torch.stack([self.seen, _moments(rows.flatten(0, -2))])))
        return ((rows - mean) * (variance + EPS).rsqrt()).to(z.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the running statistics by the rows seen since the last call; once a step.

        Every rank of the process group calls it. Nothing waits for the device.
        """
        if self.over == "batch":
            return
        mean, variance, count = self._of_all_ranks(self.seen)
        folds = self.num_folds + (count > 0)
        # (1 - m) / (1 - m^t): 1 at first, and then the bias-corrected average stays one.
        rate = (1 - MOMENTUM) / (1 - MOMENTUM ** folds.clamp_min(1))
        rate = torch.where(count > 0, rate, 0.0).to(mean.dtype)
        self.mean.lerp_(mean, rate)
        self.variance.lerp_(variance, rate)
        self.num_folds.copy_(folds)
        self.seen.zero_()

    def _of_all_ranks(self, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C], []
        """Mean, variance and number of all ranks' rows, from moments [2 C + 1] of each."""
        if self.process_group is not None:
            of_ranks = [
                torch.empty_like(own) for _ in range(dist.get_world_size(self.process_group))
            ]
            dist.all_gather(of_ranks, own, group=self.process_group)
            own = _joined(torch.stack(of_ranks))
        mean, squares = own[:-1].chunk(2)
        return mean, squares / own[-1].clamp_min(1), own[-1]


def _moments(rows: Tensor) -> Tensor:  # [N, C] -> [2 C + 1]
    """Mean, sum of squares about it, and number of rows; zeros of none."""
    count = rows.new_full((1,), len(rows))
    mean = rows.sum(0) / count.clamp_min(1)
    return torch.cat([mean, (rows - mean).square().sum(0), count])


def _joined(moments: Tensor) -> Tensor:  # [K, 2 C + 1] -> [2 C + 1]
    """Of all rows together; squares stay about a mean, as those about zero would lose digits."""
    means, squares = moments[:, :-1].chunk(2, dim=1)
    counts = moments[:, -1:]
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp_min(1)
    return torch.cat([mean, (squares + counts * (means - mean).square()).sum(0), total])
