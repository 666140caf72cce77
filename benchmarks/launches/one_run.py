"""Train a recipe for a few steps on the null CUDA runtime, with a mark in its trace at each step.

    python -m m3i_fast.benchmarks.launches.one_run RECIPE [--computed] [--plant-wait] [TRAIN FLAGS]

Run in the environment of `scripts.null_cuda.environment`. The model is built, monitored and saved
with real numbers; the other steps are only launched, unless --computed. --plant-wait reads the loss
in every step, which a test has to find.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from m3i_fast.backward_threads import release_last_backward
from m3i_fast.benchmarks.core.random_batch import Repeated, draw_any_batch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost, as_launched
from m3i_fast.config import TrainConfig
from m3i_fast.engine.train_step import TrainStep
from m3i_fast.engine.trainer import Trainer
from m3i_fast.flags import read_flags
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import recipes

NUM_STEPS = 4


def for_a_few_steps(cfg: TrainConfig) -> TrainConfig:
    """Return the recipe on the device, for a few steps of a small batch."""
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=8),
        num_steps=NUM_STEPS,
        log_every=NUM_STEPS,
        checkpoint_every=NUM_STEPS,
        num_classes=cfg.num_classes or 10,
        device="cuda",
    )


class MarkedSteps:
    """Stands for `TrainStep.__call__`: marks each step, and computes or only launches it."""

    def __init__(self, *, computed: bool, plant_wait: bool) -> None:
        self._step = TrainStep.__call__
        self._mark = ctypes.CDLL(None).null_cuda_mark
        self._computed, self._plant_wait = computed, plant_wait

    def __call__(self, step: TrainStep, *batches: Batch, monitor: bool) -> dict[str, Tensor]:
        """Take the step; a step with monitors reads what they compute, so it is computed."""
        self._mark(f"step {step.steps_taken}".encode())
        with nullcontext() if self._computed or monitor else as_launched():
            metrics = self._step(step, *batches, monitor=monitor)
            if self._plant_wait:
                metrics["loss/total"].item()
        self._mark(b"between")
        return metrics


def report(step: int, values: dict[str, float]) -> None:
    """Write a step's metrics as a line of JSON."""
    sys.stdout.write(json.dumps({"step": step, **values}) + "\n")


def train(cfg: TrainConfig, folder: Path, marked: MarkedSteps) -> None:
    """Train the config in the folder.

    Convolutions take torch's own kernels: the null cuDNN has no engines that it could offer.
    """
    torch.backends.cudnn.enabled = False
    TrainStep.__call__ = lambda step, *batches, monitor=False: marked(  # type: ignore[method-assign]
        step, *batches, monitor=monitor
    )
    with ComputeOnHost():
        batch = draw_any_batch(cfg).to(torch.device(cfg.device))
        Trainer(cfg, folder, data=Repeated(batch)).train(report)


def main() -> None:
    """Run the recipe that the command line names."""
    name, *rest = sys.argv[1:]
    computed, plant_wait = "--computed" in rest, "--plant-wait" in rest
    flags = [flag for flag in rest if flag not in ("--computed", "--plant-wait")]
    cfg = read_flags(
        TrainConfig, flags, prog=f"one_run {name}", default=for_a_few_steps(recipes()[name]())
    )
    with tempfile.TemporaryDirectory() as folder:
        train(cfg, Path(folder) / "run", MarkedSteps(computed=computed, plant_wait=plant_wait))


if __name__ == "__main__":
    main()
    release_last_backward()
