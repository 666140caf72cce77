"""How a run's samples are shared out, before and after a resume: what changes is logged."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from m3i_fast.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShares:
    """How a step is shared out: its samples, or of views of any shape its tokens."""

    size: int
    """Samples or tokens of a rank's batch."""
    unit: Literal["samples", "tokens"]
    num_ranks: int
    accumulate: int

    @property
    def whole(self) -> int:
        """Return the samples of a step, or the tokens that it may have."""
        return self.size * self.num_ranks * self.accumulate


def layout_with(cfg: TrainConfig, num_ranks: int) -> StepShares:
    """Return how a config's step is shared out among so many ranks."""
    data = cfg.data
    return StepShares(
        size=data.max_tokens_per_batch or data.batch_size,
        unit="tokens" if data.any_shape else "samples",
        num_ranks=num_ranks,
        accumulate=cfg.parallel.accumulate,
    )


def layout_of(state: Mapping[str, Any], cfg: TrainConfig) -> StepShares:
    """Return how the step of a checkpoint's state was shared out; cfg: for what it does not say."""
    layout, saved = layout_with(cfg, state.get("num_ranks", 1)), state.get("config")
    if saved is None:
        return layout
    data = saved["data"]
    return replace(
        layout,
        size=data.get("max_tokens_per_batch", 0) or data["batch_size"],
        accumulate=saved.get("parallel", {}).get("accumulate", 1),
    )


def expect_samples_a_step(before: StepShares, now: StepShares) -> None:
    """Raise ValueError where a step does not take as many samples, or tokens, as before."""
    if now.whole != before.whole:
        flag = "--data.batch-size" if now.unit == "samples" else "--data.max-tokens-per-batch"
        raise ValueError(
            f"{flag}: a step took {before.whole} {now.unit}, {_told(before)}, and "
            f"would take {now.whole}, {_told(now)}: type both {flag} and "
            f"--parallel.accumulate as they are meant; others are taken, and what they change is "
            f"told"
        )


def log_new_layout(before: StepShares, now: StepShares, *, steps_taken: int) -> None:
    """Log another number of ranks, batch or accumulation of a run that goes on.

    A warning where a step takes more or fewer samples, or tokens, than before.
    """
    if now == before:
        return
    change = f"{_told(now)} in place of {_told(before)}, from step {steps_taken} on"
    if now.whole == before.whole:
        logger.info("%s: a step takes the same %d %s", change, now.whole, now.unit)
        return
    logger.warning(
        "%s: a step takes %d %s, before %d; the data go on at the next sample, and learning "
        "rate and schedules by steps as they were",
        change,
        now.whole,
        now.unit,
        before.whole,
    )


def _told(layout: StepShares) -> str:
    ranks = "1 rank" if layout.num_ranks == 1 else f"{layout.num_ranks} ranks"
    accumulated = f" x {layout.accumulate} accumulated" if layout.accumulate > 1 else ""
    return f"{ranks} x {layout.size}{accumulated}"
