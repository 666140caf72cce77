"""Channel-wise standardisation of dense targets, which removes what all cells have in common.

Legend: N rows of this rank, C channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.models.batch_norm import join_moments, moments_of_ranks, own_moments
from m3i_fast.objectives.row_statistics import wide

MOMENTUM = 0.9  # of the running statistics, as of DINO's centre
EPS = 1e-5  # added to a variance


class Standardise(nn.Module):
    """Standardisation (z - mean) / std of each channel, without gradient, over all ranks' rows.

    running: statistics are a bias-corrected exponential average over the rows of earlier steps, so
    that a target does not depend on the other rows of its batch. Rows passed in training count from
    the next `fold` on; before the first one targets are only divided by sqrt(1 + EPS).
    batch: statistics are those of the rows of the call.
    """

    mean: Tensor  # [C] fp32
    variance: Tensor  # [C] fp32
    num_folds: Tensor  # [] int64
    pending: Tensor  # [2 C + 1] fp32, moments of the rows since the last fold

    def __init__(
        self, dim: int, over: Literal["running", "batch"], process_group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.over, self.process_group = over, process_group
        self._has_pending = False  # whether rows were passed since the last fold
        if over == "running":
            self.register_buffer("mean", torch.empty(dim))
            self.register_buffer("variance", torch.empty(dim))
            self.register_buffer("num_folds", torch.empty((), dtype=torch.int64))
            self.register_buffer("pending", torch.empty(2 * dim + 1), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every buffer, as after `to_empty`."""
        self._has_pending = False
        for buffer in self.buffers():
            buffer.zero_()
        if self.over == "running":
            self.variance.fill_(1.0)

    @torch.no_grad()
    def forward(self, z: Tensor) -> Tensor:  # [..., C] -> [..., C] in the dtype of z
        rows = wide(z)
        if self.over == "batch":
            mean, variance, _ = moments_of_ranks(
                own_moments(rows.flatten(0, -2)), self.process_group
            )
        else:
            mean, variance = self.mean, self.variance
            if self.training:
                newest = own_moments(rows.flatten(0, -2))
                if self._has_pending:
                    newest = join_moments(torch.stack([self.pending, newest]))
                self.pending.copy_(newest)
                self._has_pending = True
        return ((rows - mean) * (variance + EPS).rsqrt()).to(z.dtype)

    @torch.no_grad()
    def fold(self) -> None:
        """Update the running statistics by the rows since the last call; to be called once a step.

        All-gathers over the process group, so that every rank has to call it. Does not synchronise
        with the host.
        """
        if self.over == "batch":
            return
        mean, variance, count = moments_of_ranks(self.pending, self.process_group)
        folds = self.num_folds + (count > 0)
        # (1 - m) / (1 - m^t) is 1 at first and keeps the average bias-corrected.
        rate = (1 - MOMENTUM) / (1 - MOMENTUM ** folds.clamp_min(1))
        rate = torch.where(count > 0, rate, 0.0).to(mean.dtype)
        self.mean.lerp_(mean, rate)
        self.variance.lerp_(variance, rate)
        self.num_folds.copy_(folds)
        self.pending.zero_()
        self._has_pending = False
