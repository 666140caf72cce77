"""Losses that keep something from step to step, or take a teacher's features, as modules.

A module's state is buffers, which `reset_parameters` sets and the run's checkpoints hold. With a
process group the state is that of the rows of all ranks. Legend: N rows, E features, K rows of a
queue or prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.objectives.losses.distillation import (
    inverse_temperature,
    mean_entropy,
    self_distillation,
    update_centre,
)
from m3i_fast.objectives.losses.regularisers import unigrad, update_correlation
from m3i_fast.objectives.losses.similarity import dense_contrastive, moco, rows_of_ranks
from m3i_fast.objectives.row_statistics import wide
from m3i_fast.ops import SoftTargets

Group = dist.ProcessGroup | None


class Queued(nn.Module):
    """Compute MoCo's loss, with a queue of the targets of earlier steps as negatives.

    The queue is the same on all ranks of a process group, which have equal numbers of rows, or as
    many as `counts` say.
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

    def forward(
        self, z_hat: Tensor, z: Tensor, *, counts: Sequence[int] = ()
    ) -> Tensor:  # [N, E], [N, E] -> []
        """Return the loss, and in training put the targets into the queue."""
        value = moco(z_hat, z, self.queue.clone(), temperature=self.temperature)
        self._remember(z, counts)
        return value

    @torch.no_grad()
    def _remember(self, z: Tensor, counts: Sequence[int] = ()) -> None:
        """Put the targets of all ranks into the queue; counts: of each, empty for equal ones."""
        if not self.training:
            return
        newest = F.normalize(z.to(self.queue.dtype), dim=-1)
        newest, _ = rows_of_ranks(newest, counts, self.group)
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


# ---- Prototypes: targets(the teacher's features of all views), then loss(predictions, targets) ---


class TargetScale(nn.Module):
    """Compute 1 / temperature of the targets, which may move over the first steps.

    From step to step it goes from `start` to `end` in equal parts, as DINO's: the steps are counted
    on the device.
    """

    num_steps: Tensor  # [] int64, of training so far; there is none without a warm-up

    def __init__(self, start: float, end: float | None = None, warmup_steps: int = 0) -> None:
        super().__init__()
        self.start, self.end, self.warmup_steps = start, start if end is None else end, warmup_steps
        if warmup_steps:
            self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Set the count of steps to 0."""
        if self.warmup_steps:
            self.num_steps.zero_()

    @torch.no_grad()
    def forward(self, like: Tensor) -> Tensor:  # -> [], as `inverse_temperature`
        """Return the scale of this step, and count it in training."""
        end = inverse_temperature(self.end, like)
        if not self.warmup_steps:
            return end
        share = (self.num_steps / max(self.warmup_steps - 1, 1)).clamp(max=1).to(end.dtype)
        if self.training:
            self.num_steps += 1
        return (self.start + (self.end - self.start) * share).reciprocal()


class Prototypes(nn.Module, ABC):
    """Compute the cross-entropy with the teacher's assignment, which subclasses define.

    Logits are products of features and prototypes, and no [N, K] array of them is stored. The loss
    is called once a step, with the rows of all pairs of an input view and a target view.
    """

    SHARP: float
    """Temperature of the targets in the paper."""

    def __init__(
        self,
        temperature: float,
        group: Group,
        *,
        target_temperature: float | None = None,
        target_warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.temperature, self.group = temperature, group
        self.target_scale = TargetScale(self.sharp, target_temperature, target_warmup_steps)

    @property
    def sharp(self) -> float:
        """Return the temperature of the targets in the paper."""
        return self.SHARP

    @abstractmethod
    def targets(
        self,
        features: Sequence[Tensor],  # [N, E] of each target view, the teacher's
        prototypes: Tensor,  # [K, E], the teacher's
    ) -> list[SoftTargets]:
        """Return each target view's assignment. It carries no gradient.

        Views whose logits are scaled by column alike have the same tensor `column_log_scale`.
        """

    def forward(
        self,
        features: Sequence[Tensor],  # [N, E] of each pair, the student's
        targets: Sequence[SoftTargets],  # of each pair
        prototypes: Tensor,  # [K, E]
        *,
        weight: float = 1.0,
    ) -> Tensor:  # []
        """Return the mean cross-entropy over the rows of all pairs, times the weight of the rows.

        weight: other than 1 where ranks have unequal numbers of rows. Where targets have row
        weights, those of each pair sum to 1, and the mean is that of the pairs' weighted means.
        """
        calls: dict[int, list[int]] = {}
        for place, of_pair in enumerate(targets):
            calls.setdefault(id(of_pair.column_log_scale), []).append(place)
        weighs_rows = targets[0].row_weights is not None
        num_rows = len(features) if weighs_rows else sum(len(rows) for rows in features)
        values = []
        for places in calls.values():  # one of all pairs, unless columns are scaled by view
            rows = _stacked([features[n] for n in places])
            of_rows = replace(
                targets[places[0]], z_hat=_stacked([targets[n].z_hat for n in places])
            )
            if weighs_rows:
                weights = [w for n in places if (w := targets[n].row_weights) is not None]
                of_rows = replace(of_rows, row_weights=_stacked(weights))
            value = self_distillation(rows, prototypes, of_rows, temperature=self.temperature)
            own = len(places) if weighs_rows else len(rows)
            values.append(value if own == num_rows else own / num_rows * value)
        mean = sum(values[1:], start=values[0])
        return mean if weight == 1.0 else weight * mean


def _stacked(rows: Sequence[Tensor]) -> Tensor:  # [N, E] each -> [sum of N, E]
    """Concatenate rows, without a copy of one tensor alone."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


class Centred(Prototypes):
    """Centre the logits with momentum 0.9, and sharpen them. DINO, arXiv 2104.14294.

    of_targets: as of `Prototypes`.
    """

    SHARP = 0.04
    centre: Tensor  # [K] fp32

    def __init__(
        self, temperature: float, group: Group, num_prototypes: int, **of_targets: Any
    ) -> None:
        super().__init__(temperature, group, **of_targets)
        self.register_buffer("centre", torch.empty(num_prototypes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the centre to 0, as the count of steps."""
        self.centre.zero_()
        self.target_scale.reset_parameters()

    @torch.no_grad()
    def targets(self, features: Sequence[Tensor], prototypes: Tensor) -> list[SoftTargets]:
        scale = self.target_scale(prototypes)
        centring = -scale * self.centre.to(scale.dtype)
        if self.training:  # once for all views: none is centred by another one
            rows = _stacked(features)
            moved = update_centre(self.centre, rows, prototypes, process_group=self.group)
            self.centre.copy_(moved)
        return [SoftTargets(view, prototypes, scale, centring) for view in features]


class Balanced(Prototypes):
    """Spread the rows of each view evenly over prototypes by Sinkhorn-Knopp.

    SwAV, arXiv 2006.09882.
    """

    SHARP = 0.05

    def targets(self, features: Sequence[Tensor], prototypes: Tensor) -> list[SoftTargets]:
        scale = self.target_scale(prototypes)
        return [
            SoftTargets.sinkhorn(view, prototypes, scale, process_group=self.group)
            for view in features
        ]


class JointlyBalanced(Balanced):
    """Spread the rows of all views at once. DINOv2, arXiv 2304.07193, and DINOv3, 2508.10104."""

    SHARP = 0.04

    def targets(self, features: Sequence[Tensor], prototypes: Tensor) -> list[SoftTargets]:
        (assigned,) = super().targets([_stacked(features)], prototypes)
        parts = assigned.z_hat.split([len(view) for view in features])
        return [replace(assigned, z_hat=part) for part in parts]


class MeanEntropy(Prototypes):
    """Sharpen the targets, and keep the mean assignment even (me-max). MSN, arXiv 2204.07141."""

    SHARP = 0.25  # times the temperature
    WEIGHT = 1.0

    @property
    def sharp(self) -> float:
        return self.SHARP * self.temperature

    def targets(self, features: Sequence[Tensor], prototypes: Tensor) -> list[SoftTargets]:
        scale = self.target_scale(prototypes)
        return [
            SoftTargets.sinkhorn(view, prototypes, scale, whole_rows=True, process_group=self.group)
            for view in features
        ]

    def forward(
        self,
        features: Sequence[Tensor],
        targets: Sequence[SoftTargets],
        prototypes: Tensor,
        *,
        weight: float = 1.0,
    ) -> Tensor:
        """Return the mean cross-entropy, plus the mean assignment's distance from an even one."""
        spread = mean_entropy(
            _stacked(features),
            prototypes,
            temperature=self.temperature,
            process_group=self.group,
        )
        entropy = super().forward(features, targets, prototypes, weight=weight)
        return entropy + self.WEIGHT * spread
