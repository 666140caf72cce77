"""Train a recipe for a few steps on the null CUDA runtime, with a mark in the trace at each step.

    python -m m3i_fast.benchmarks.launches.one_run RECIPE [--computed] [TRAIN FLAGS]

Run with the environment of `scripts.null_cuda.environment`. The model is built, saved and evaluated
with real numbers; the steps themselves are only launched unless --computed.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.benchmarks.launches.on_host import ComputeOnHost, as_launched
from m3i_fast.config import TrainConfig
from m3i_fast.engine.train_step import TrainStep
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import recipes

mark = ctypes.CDLL(None).null_cuda_mark


def small(cfg: TrainConfig, num_steps: int) -> TrainConfig:
    """Return the config on the device, for a few steps of a small batch."""
    data = replace(cfg.data, batch_size=8)
    return replace(
        cfg, data=data, num_steps=num_steps, log_every=num_steps, checkpoint_every=num_steps,
        num_classes=cfg.num_classes or 10, device="cuda",
    )  # fmt: skip


class OnDevice(Repeated):
    """The batch, on the device as DALI hands it over."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch.to(torch.device("cuda")))


def run(cfg: TrainConfig, folder: Path, *, computed: bool) -> int:
    """Train the config in the folder; return the steps taken."""
    step = TrainStep.__call__

    def marked(self: TrainStep, *batches: Batch, monitor: bool = False) -> Any:
        mark(f"step {self.steps_taken}".encode())
        with nullcontext() if computed or monitor else as_launched():
            metrics = step(self, *batches, monitor=monitor)
        mark(b"between")
        return metrics

    TrainStep.__call__ = marked  # type: ignore[method-assign]
    with ComputeOnHost():
        trainer = Trainer(cfg, folder, data=OnDevice(draw_batch(cfg)))
        return trainer.train(lambda step, values: print(step, values.get("loss"), values)).step


def main() -> None:
    """Run the recipe that the command line names."""
    name, *rest = sys.argv[1:]
    cfg = small(recipes()[name](), num_steps=4)
    with tempfile.TemporaryDirectory() as folder:
        print(name, run(cfg, Path(folder) / "run", computed="--computed" in rest))


if __name__ == "__main__":
    main()
