"""How many steps a time allows, on this machine and on the threads of the config."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer

NUM_WARM, NUM_TIMED = 20, 40  # steps

logger = logging.getLogger(__name__)


def calibrate(cfg: TrainConfig, seconds: float) -> int:
    """Return how many steps fit into `seconds` on `cfg.num_threads`, at least NUM_TIMED.

    A few steps are timed, and thrown away. Raises ValueError unless `seconds` is positive and
    finite.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a finite number > 0, got {seconds}")
    each = step_seconds(cfg)
    num_steps = max(NUM_TIMED, round(seconds / each))
    logger.info("%.0f ms a step: %d steps in %.0f s", 1000 * each, num_steps, seconds)
    return num_steps


def step_seconds(cfg: TrainConfig) -> float:
    """Time a step of a run on `cfg.num_threads`: the mean of NUM_TIMED, after NUM_WARM."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(replace(cfg, num_steps=NUM_WARM + NUM_TIMED), Path(scratch) / "run")
        _take_steps(trainer, NUM_WARM)
        began = time.perf_counter()
        _take_steps(trainer, NUM_TIMED)
        each = (time.perf_counter() - began) / NUM_TIMED
        trainer.loader.close()
    return each


def _take_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.train_step(next(trainer.loader).to(trainer.device))
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
