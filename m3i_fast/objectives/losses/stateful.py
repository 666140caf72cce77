"""Losses that keep something from step to step, or take a teacher's logits, as modules.

A module's state is buffers, which `reset_parameters` sets and the run's checkpoints hold. With a
process group the state is that of the rows of all ranks. Legend: N rows, E features, K rows of a
queue or prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.objectives.losses.distillation import (
    centred_softmax,
    mean_entropy,
    self_distillation,
    sinkhorn_knopp,
    update_centre,
)
from m3i_fast.objectives.losses.regularisers import unigrad, update_correlation
from m3i_fast.objectives.losses.similarity import dense_contrastive, moco
from m3i_fast.objectives.row_statistics import wide

Group = dist.ProcessGroup | None


class Queued(nn.Module):
    """Compute MoCo's loss, with a queue of the targets of earlier steps as negatives.

    Ranks of a process group have equal numbers of rows, and the queue is the same on all of them.
    """

    queue: Tensor  # [K, E] fp32, unit rows, newest first

    def __init__(self, temperature: float, queue_length: int, dim: int, group: Group) -> None:
        super().__init__()
        self.temperature, self.group = temperature, group
        self.register_buffer("queue", torch.empty(queue_length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the queue with random unit rows."""
        self.queue.copy_(F.normalize(torch.randn_like(self.queue), dim=-1))

    def forward(self, z_hat: Tensor, z: Tensor) -> Tensor:  # [N, E], [N, E] -> []
        """Return the loss, and in training put the targets into the queue."""
        value = moco(z_hat, z, self.queue.clone(), temperature=self.temperature)
        self._remember(z)
        return value

    @torch.no_grad()
    def _remember(self, z: Tensor) -> None:
        if not self.training:
            return
        newest = F.normalize(z.to(self.queue.dtype), dim=-1)
        if self.group is not None:
            own = newest.contiguous()
            newest = own.new_empty(dist.get_world_size(self.group) * len(own), own.shape[1])
            dist.all_gather_into_tensor(newest, own, group=self.group)
        self.queue.copy_(torch.cat([newest, self.queue])[: len(self.queue)])


class DenseQueued(Queued):
    """Compute DenseCL's loss.

    The queue holds one target per image, the mean of its cells' projections.
    """

    def forward(  # type: ignore[override]
        self, z_hat: Tensor, z: Tensor, features_hat: Tensor, features: Tensor
    ) -> Tensor:  # [N, n, E], [N, m, E], [N, n, C], [N, m, C] -> []
        """Return the loss of projections z and the encoder's features of n and m cells a view."""
        value = dense_contrastive(
            z_hat, z, features_hat, features, self.queue.clone(), temperature=self.temperature
        )
        self._remember(z.mean(1))
        return value


class UniGrad(nn.Module):
    """Compute UniGrad's loss with its running correlation of the targets."""

    correlation: Tensor  # [E, E] fp32

    def __init__(self, dim: int, group: Group) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("correlation", torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the correlation to 0, which the first step's replaces."""
        self.correlation.zero_()

    @torch.no_grad()
    def observe(self, z: Sequence[Tensor]) -> None:  # 1 or 2 x [N, E]
        """Update the correlation by the targets of all views of a step.

        Called once a step and before its losses, as the authors do. The first step's correlation
        is taken as it is, later ones move the running one.
        """
        if self.training:
            pair = [F.normalize(wide(z[n]), dim=-1) for n in (0, -1)]
            group = self.group
            first = update_correlation(self.correlation, *pair, momentum=0.0, process_group=group)
            moved = update_correlation(self.correlation, *pair, process_group=group)
            self.correlation.copy_(torch.where(self.correlation.any(), moved, first))

    def forward(self, z_hat: Tensor, z: Tensor) -> Tensor:  # [N, E], [N, E] -> []
        """Return the loss, with rows scaled to unit length."""
        z_hat, z = F.normalize(wide(z_hat), dim=-1), F.normalize(wide(z), dim=-1)
        return unigrad(z_hat, z, self.correlation.clone())


# ---- Prototypes: targets(the teacher's logits of all views), then loss(logits, targets) ----------


class Prototypes(nn.Module, ABC):
    """Compute the cross-entropy with the teacher's assignment, which subclasses define.

    The loss is called once a step, with the rows of all pairs of views.
    """

    def __init__(self, temperature: float, group: Group) -> None:
        super().__init__()
        self.temperature, self.group = temperature, group

    @abstractmethod
    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return the teacher's logits [N, K] of each target view as probabilities [N, K].

        They carry no gradient.
        """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:  # [N, K], [N, K] -> []
        """Return the mean cross-entropy of the student's logits."""
        return self_distillation(logits, targets, temperature=self.temperature)


class Centred(Prototypes):
    """Centre the logits with momentum 0.9, and sharpen them by temperature 0.04.

    DINO, arXiv 2104.14294.
    """

    SHARP = 0.04
    centre: Tensor  # [K] fp32

    def __init__(self, temperature: float, group: Group, num_prototypes: int) -> None:
        super().__init__(temperature, group)
        self.register_buffer("centre", torch.empty(num_prototypes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the centre to 0."""
        self.centre.zero_()

    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        probabilities = [
            centred_softmax(view, self.centre, temperature=self.SHARP) for view in logits
        ]
        if self.training:  # once for all views: none is centred by another one
            rows = torch.cat(list(logits))
            self.centre.copy_(update_centre(self.centre, rows, process_group=self.group))
        return probabilities


class Balanced(Prototypes):
    """Spread the rows evenly over prototypes by Sinkhorn-Knopp. SwAV, arXiv 2006.09882."""

    SHARP = 0.05

    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        return [
            sinkhorn_knopp(view, temperature=self.SHARP, process_group=self.group)
            for view in logits
        ]


class MeanEntropy(Prototypes):
    """Sharpen the targets, and keep the mean assignment even (me-max). MSN, arXiv 2204.07141."""

    SHARP = 0.25  # times the temperature
    WEIGHT = 1.0

    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        sharp = self.SHARP * self.temperature
        rows = [(wide(view) / sharp).log_softmax(-1) for view in logits]
        return [sinkhorn_knopp(view, temperature=1.0, process_group=self.group) for view in rows]

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, plus the mean assignment's distance from an even one."""
        spread = mean_entropy(logits, temperature=self.temperature, process_group=self.group)
        return super().forward(logits, targets) + self.WEIGHT * spread
