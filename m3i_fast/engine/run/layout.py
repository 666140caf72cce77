"""How a run's samples are shared out, before and after a resume: what changes is logged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from m3i_fast.config import TrainConfig
from m3i_fast.pipelines.sample_order.positions import StepLayout

logger = logging.getLogger(__name__)


def layout_with(cfg: TrainConfig, num_ranks: int) -> StepLayout:
    """Return how a config's step is shared out among so many ranks.

    Raises ValueError where a batch is not a whole number of inputs.
    """
    return StepLayout(
        batch_size=cfg.data.batch_size,
        num_ranks=num_ranks,
        accumulate=cfg.parallel.accumulate,
        images_per_input=cfg.objective.mixing.images_per_input,
    )


def layout_of(state: Mapping[str, Any], cfg: TrainConfig) -> StepLayout:
    """Return how the step of a checkpoint's state was shared out; cfg: for what it does not say."""
    layout, saved = layout_with(cfg, state.get("num_ranks", 1)), state.get("config")
    if saved is None:
        return layout
    return replace(
        layout,
        batch_size=saved["data"]["batch_size"],
        accumulate=saved.get("parallel", {}).get("accumulate", 1),
    )


def expect_samples_a_step(before: StepLayout, now: StepLayout) -> None:
    """Raise ValueError where a step does not take as many samples as before."""
    if now.samples_a_step != before.samples_a_step:
        raise ValueError(
            f"--data.batch-size: a step took {before.samples_a_step} samples, {_told(before)}, and "
            f"would take {now.samples_a_step}, {_told(now)}: type both --data.batch-size and "
            f"--parallel.accumulate as they are meant; others are taken, and what they change is "
            f"told"
        )


def log_new_layout(before: StepLayout, now: StepLayout, *, steps_taken: int) -> None:
    """Log another number of ranks, batch or accumulation of a run that goes on.

    A warning where a step takes more or fewer samples than before.
    """
    if now == before:
        return
    change = f"{_told(now)} in place of {_told(before)}, from step {steps_taken} on"
    if now.samples_a_step == before.samples_a_step:
        logger.info("%s: a step takes the same %d samples", change, now.samples_a_step)
        return
    logger.warning(
        "%s: a step takes %d samples, before %d; the data go on at the next sample, and learning "
        "rate and schedules by steps as they were",
        change,
        now.samples_a_step,
        before.samples_a_step,
    )


def _told(layout: StepLayout) -> str:
    ranks = "1 rank" if layout.num_ranks == 1 else f"{layout.num_ranks} ranks"
    accumulated = f" x {layout.accumulate} accumulated" if layout.accumulate > 1 else ""
    return f"{ranks} x {layout.batch_size}{accumulated}"
