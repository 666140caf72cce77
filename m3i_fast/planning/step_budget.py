"""How many steps a time allows, on this machine and on the threads of the config."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer

NUM_WARM, NUM_TIMED = 8, 12  # steps
BUSY = 1.5  # wall-clock time over this thread's processor time, from which on others share them

Progress = Callable[[int, int], None]  # of steps taken, and in all

logger = logging.getLogger(__name__)


def calibrate(
    cfg: TrainConfig, seconds: float, progress: Progress = lambda done, total: None
) -> int:
    """Return how many steps fit into `seconds` on `cfg.num_threads`, at least NUM_TIMED.

    A few steps are timed, and thrown away. Raises ValueError unless `seconds` is positive and
    finite.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a finite number > 0, got {seconds}")
    each = step_seconds(cfg, progress)
    num_steps = max(NUM_TIMED, round(seconds / each))
    logger.info("%.0f ms a step: %d steps in %.0f s", 1000 * each, num_steps, seconds)
    return num_steps


def step_seconds(cfg: TrainConfig, progress: Progress = lambda done, total: None) -> float:
    """Time a step of a run on `cfg.num_threads`: the median of NUM_TIMED, after NUM_WARM.

    If other processes take the processors, NUM_TIMED more are timed, the lower median is returned,
    and a warning says so.
    """
    with tempfile.TemporaryDirectory() as scratch:
        most = NUM_WARM + 2 * NUM_TIMED
        trainer = Trainer(replace(cfg, num_steps=most), Path(scratch) / "run")
        on_cpu = trainer.device.type == "cpu"

        def median(first: int, count: int) -> tuple[float, float]:
            """Return the median time of a step, and the wall clock over this thread's time."""
            each, cpu, began = [], time.thread_time(), time.perf_counter()
            for done in range(first, first + count):
                started = time.perf_counter()
                trainer.train_step(next(trainer.loader).to(trainer.device))
                if not on_cpu:
                    torch.cuda.synchronize()
                each.append(time.perf_counter() - started)
                progress(done + 1, max(NUM_WARM + NUM_TIMED, first + count))
            used = max(time.thread_time() - cpu, 1e-9)
            return statistics.median(each), (time.perf_counter() - began) / used

        median(0, NUM_WARM)
        each, share = median(NUM_WARM, NUM_TIMED)
        if on_cpu and share > BUSY:
            again, _ = median(NUM_WARM + NUM_TIMED, NUM_TIMED)
            logger.warning(
                "the processors are busy: a step took %.0f ms, and %.0f ms when it was measured "
                "again: the run may get fewer steps than on an idle machine",
                *(1000 * each, 1000 * again),
            )
            each = min(each, again)
        trainer.loader.close()
    return each
