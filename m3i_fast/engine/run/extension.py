"""Another number of steps for a run that goes on: what it changes, told before it does."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from m3i_fast.config import TrainConfig
from m3i_fast.engine.optim.schedules import lr_schedule, momentum_schedule, weight_decay_schedule

logger = logging.getLogger(__name__)


def schedules_of(cfg: TrainConfig) -> dict[str, np.ndarray]:  # name -> [num_steps] fp64
    """Compute everything of a run that depends on num_steps, by the name of its config field."""
    mixing, progress = cfg.objective.mixing, np.linspace(0, 1, cfg.num_steps)
    schedules = {
        "optim.lr": lr_schedule(cfg.optim, cfg.num_steps),
        "optim.weight_decay": weight_decay_schedule(cfg.optim, cfg.num_steps),
        "ema.momentum": momentum_schedule(cfg.ema, cfg.num_steps),
    }
    if mixing.mode == "masked":
        change = mixing.final_mask_ratio - mixing.mask_ratio
        schedules["objective.mixing.mask_ratio"] = mixing.mask_ratio + change * progress
    return schedules


def log_new_num_steps(cfg: TrainConfig, *, before: int, steps_taken: int) -> None:
    """Log whether `cfg` continues a run of `before` steps as if it had been its config all along.

    It does where all schedules are those of `before` up to here. Otherwise a warning tells each
    schedule that jumps, from and to which value. Raises ValueError where fewer steps are asked for
    than were taken.
    """
    if cfg.num_steps < steps_taken:
        raise ValueError(
            f"--num-steps: expected at least the {steps_taken} steps that the run has taken, got "
            f"{cfg.num_steps}"
        )
    earlier, now = schedules_of(replace(cfg, num_steps=before)), schedules_of(cfg)
    changed = [
        name
        for name, values in now.items()
        if not np.array_equal(earlier[name][:steps_taken], values[:steps_taken])
    ]
    said = f"--num-steps {cfg.num_steps} in place of {before}, from step {steps_taken} on"
    if not changed:
        logger.info("%s: the same run as one of %d steps from its start", said, cfg.num_steps)
        return
    index = min(steps_taken, before - 1), min(steps_taken, cfg.num_steps - 1)
    places = {name: (earlier[name][index[0]], now[name][index[1]]) for name in changed}
    jumps = ", ".join(
        f"{name} jumps from {old:.4g} to {new:.4g}"
        if old != new
        else f"{name} had other values before"
        for name, (old, new) in places.items()
    )
    logger.warning(
        "%s: not the run that %d steps from its start would be: %s", said, cfg.num_steps, jumps
    )
