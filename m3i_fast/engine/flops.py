"""Floating-point operations of a training step of a run, in closed form from its config."""

from __future__ import annotations

from collections.abc import Mapping

from m3i_fast.config import TrainConfig
from m3i_fast.models.flops import Flops
from m3i_fast.objectives import flops as objective_flops
from m3i_fast.objectives.counts import Counts


def counts_of(cfg: TrainConfig, *, num_ranks: int = 1, progress: float = 0.0) -> Counts:
    """What the step of one of `num_ranks` ranks has; `progress` of the run, 0 to 1."""
    local = cfg.data.local_views
    return Counts(
        vision=cfg.vision,
        text=cfg.text,
        objective=cfg.objective,
        num_classes=cfg.num_classes,
        batch_size=cfg.data.batch_size,
        num_ranks=num_ranks,
        num_local=local.count if local is not None else 0,
        local_size=local.size if local is not None else 0,
        progress=progress,
    )


def step_flops(cfg: TrainConfig, *, num_ranks: int = 1, progress: float = 0.0) -> dict[str, Flops]:
    """Of one rank, by part of the model, without optimiser, moving average and monitors.

    Raises ValueError for a frozen teacher, whose size the config does not say.
    """
    if cfg.objective.uses(encoder="frozen"):
        raise ValueError(
            "objective.terms: expected no term with a frozen encoder, whose size the recipe does "
            f"not say, got teacher {cfg.objective.teacher}"
        )
    return objective_flops.step(counts_of(cfg, num_ranks=num_ranks, progress=progress))


def without_sampling(parts: Mapping[str, Flops]) -> Flops:
    """The sum of all matrix products and convolutions: what a peak rate is divided into."""
    return sum((v for k, v in parts.items() if k != objective_flops.SAMPLING), start=Flops())
