"""Stochastic depth, and the priorities by which samples keep their branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_fast.config.fields import DropPathMode
from m3i_fast.models.transformer.layers import Residual
from m3i_fast.models.transformer.packing import Packed


def num_kept(num_samples: int, rate: float) -> int:
    """Count the samples that a branch keeps with stochastic depth by subset, at least one."""
    return max(1, round(num_samples * (1 - rate)))


NUM_PRIORITIES = 2**24


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): a residual branch is dropped for whole samples.

    In training only. mask: each sample is dropped by its own draw, after the branch is computed;
    the kept ones are scaled by 1 / (1 - rate). subset (DINOv2): a fixed share of each batch is
    dropped before the branch, which is computed for the kept samples only; these are scaled by B
    over their number.

    priority: [B] int32, uniform in [0, 2**24), by which samples are dropped: those below the rate,
    or with subset the lowest of the batch. A training step draws them by the samples'
    positions in the run; None draws from torch's global generator.
    """

    def __init__(self, rate: float, mode: DropPathMode = "mask") -> None:
        super().__init__()
        self.rate, self.mode = rate, mode

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, mode={self.mode}"

    def forward(
        self,
        branch: Tensor,  # [B, ...]
        priority: Tensor | None = None,  # [B] int32
    ) -> Tensor:  # [B, ...]
        """Return the branch with dropped samples zeroed and kept ones scaled, in mode mask."""
        if not self.training or self.rate == 0.0 or self.mode == "subset":
            return branch
        scales = self._scales(branch.shape[0], branch, priority)
        return branch * scales.view(-1, *(1,) * (branch.ndim - 1))

    def _scales(self, count: int, branch: Tensor, priority: Tensor | None) -> Tensor:  # [count]
        """Return 0 for each sample that is dropped, and 1 / (1 - rate) for the others."""
        keep = 1.0 - self.rate
        if priority is None:
            kept = branch.new_empty(count).bernoulli_(keep)
        else:
            kept = (priority >= round(self.rate * NUM_PRIORITIES)).to(branch.dtype)
        return kept.div_(keep)

    def draw(self, x: Tensor, priority: Tensor | None = None) -> Tensor | None:
        """Draw the samples of x [B, ...] that go through the branch: [kept] int64, None for all."""
        if not self.training or self.rate == 0.0 or self.mode == "mask":
            return None
        if priority is None:
            order = torch.randperm(len(x), device=x.device)
        else:
            order = priority.argsort(stable=True, descending=True)
        return order[: num_kept(len(x), self.rate)]

    def join(
        self,
        x: Tensor,  # [B, ...]
        branch: Tensor,  # [B or kept, ...]
        scale: Tensor | None,
        rows: Tensor | None = None,  # [kept] int64
        priority: Tensor | None = None,  # [B] int32
    ) -> Residual:  # [B, ...]
        """Return x + scale * branch, the branch still to be added where nothing scales it.

        rows: the samples of x that the branch has, None for all.
        """
        if rows is not None:
            branch = branch if scale is None else branch * scale
            added = x.index_add(0, rows, branch.to(x.dtype), alpha=len(x) / max(len(rows), 1))
            return Residual(added)
        branch = self(branch, priority)
        # one pass instead of two over the branch
        return Residual(x, branch) if scale is None else Residual(torch.addcmul(x, branch, scale))

    def join_packed(
        self,
        x: Tensor,  # [T, D]
        branch: Tensor,  # [T, D]
        scale: Tensor | None,
        packed: Packed,
        priority: Tensor | None = None,  # [N] int32
    ) -> Residual:  # [T, D]
        """Return x + scale * branch as `join`, dropped for whole sequences of a packed batch.

        In mode mask: which tokens a subset would leave is not known on the host.
        """
        if self.training and self.rate:
            assert self.mode == "mask" and packed.sequence is not None
            scales = self._scales(packed.num_sequences, branch, priority)
            branch = branch * scales[packed.sequence][:, None]
        return Residual(x, branch) if scale is None else Residual(torch.addcmul(x, branch, scale))

    def add(
        self,
        x: Tensor,  # [B, ...]
        branch: Tensor,  # [B or kept, ...]
        scale: Tensor | None,
        rows: Tensor | None,  # [kept] int64
        priority: Tensor | None = None,  # [B] int32
    ) -> Tensor:  # [B, ...]
        """Return x + scale * branch, as `join`."""
        return self.join(x, branch, scale, rows, priority).total()


def branch_priorities(
    priority: Tensor | None,  # [B, 2] int32
) -> tuple[Tensor | None, Tensor | None]:
    """Return the priorities of a layer's first and second branch, [B] each, or none."""
    return (None, None) if priority is None else (priority[:, 0], priority[:, 1])


def layer_priorities(
    priority: Tensor | None,  # [B, 2 L] int32
    layer: int,
) -> Tensor | None:
    """Return the priorities of a layer's two branches, [B, 2], or none."""
    return None if priority is None else priority[:, 2 * layer : 2 * layer + 2]


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Select rows [kept] int64 of x [B, ...]; None returns x itself."""
    return x if rows is None else x[rows]
