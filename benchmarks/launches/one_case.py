"""A case of the matrix on the null CUDA runtime: its steps, and the allocator's peak of one.

    python -m m3i_fast.benchmarks.launches.one_case RECIPE [--step-alone] [--plant NAME] [FLAGS]

Run by `scripts.null_cuda`. The trace has marks as those of `one_run`, and lines of the backward
pass where NULL_CUDA_LINES=1; the last line of the output is JSON: bytes of torch's allocator at the
peak of the steady step.

--step-alone: a step without the trainer around it, on weights that nobody drew: what a recipe at
full size takes seconds for. --plant: what a test has to find in every step: a `wait`, 40
`launches`, a `pageable` copy, or an `allocation`.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from m3i_fast.backward_threads import release_last_backward
from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.launches.backward_lines import marked_backward
from m3i_fast.benchmarks.launches.one_run import MarkedSteps, for_a_few_steps, train
from m3i_fast.config import TrainConfig
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.parallel.ranks import join_world
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_device, resolve_precision
from m3i_fast.engine.precision.fp8 import layers_of
from m3i_fast.engine.train_step import TrainStep
from m3i_fast.flags import read_flags
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import recipes

# Of the steps the second captures CUDA graphs, and the third pins again what the capture gave back.
STEADY, NUM_STEPS = 3, 5
# Of a step alone, which at full size finds a block that fits no earlier than this.
STEADY_ALONE = 5


def case_config(recipe: str, flags: list[str]) -> TrainConfig:
    """Return the recipe with its flags, for a few steps of a small batch, uncompiled."""
    few = for_a_few_steps(recipes()[recipe]())
    few = replace(few, num_steps=NUM_STEPS, log_every=NUM_STEPS, checkpoint_every=NUM_STEPS)
    return read_flags(
        TrainConfig, flags, prog=f"one_case {recipe}", default=replace(few, compile=False)
    )


LEAKED: list[Tensor] = []


def plant_wait(loss: Tensor) -> None:
    """Read the loss on the host."""
    loss.item()


def plant_launches(loss: Tensor) -> None:
    """Launch forty kernels."""
    for _ in range(40):
        loss.neg_()


def plant_pageable(loss: Tensor) -> None:
    """Copy a number from memory that is not pinned."""
    torch.ones(1).to(loss.device, non_blocking=True)


def plant_allocation(loss: Tensor) -> None:
    """Keep a tensor of every step."""
    LEAKED.append(torch.empty(64 << 20, dtype=torch.uint8, device=loss.device))


PLANTS: dict[str, Callable[[Tensor], None]] = {
    "wait": plant_wait,
    "launches": plant_launches,
    "pageable": plant_pageable,
    "allocation": plant_allocation,
}


class MeasuredSteps(MarkedSteps):
    """Marked steps, with the allocator's bytes of the steady one."""

    def __init__(self, steady: int, *, lines_below: Path | None, plant: str | None) -> None:
        super().__init__(computed=False, plant_wait=False)
        self._steady = steady
        self.memory: dict[str, int] = {}
        self._lines_below = lines_below
        if plant is not None:
            plain, planted = self._step, PLANTS[plant]

            def step_with_plant(
                step: TrainStep, *batches: Batch, monitor: bool = False
            ) -> dict[str, Tensor]:
                metrics = plain(step, *batches, monitor=monitor)
                planted(metrics["loss/total"].detach())
                return metrics

            self._step = step_with_plant  # type: ignore[assignment]

    def __call__(self, step: TrainStep, *batches: Batch, monitor: bool) -> dict[str, Tensor]:
        """Take the step, with the allocator's peak and lines where it is the steady one."""
        if step.steps_taken != self._steady:
            return super().__call__(step, *batches, monitor=monitor)
        torch.cuda.reset_peak_memory_stats()
        below = self._lines_below
        lines = marked_backward(ctypes.CDLL(None).null_cuda_mark, below) if below else nullcontext()
        with lines:
            metrics = super().__call__(step, *batches, monitor=monitor)
        stats = torch.cuda.memory_stats()
        names = ("allocated", "requested", "reserved")
        self.memory = {name: stats[f"{name}_bytes.all.peak"] for name in names}
        return metrics


def take_steps(cfg: TrainConfig, measured: MeasuredSteps) -> None:
    """Take steps without a trainer up to the steady one, on weights as they were allocated."""
    torch.backends.cudnn.enabled = False  # as in `train`
    cfg = replace(cfg, num_steps=STEADY_ALONE + 1)
    world = join_world(resolve_device(cfg.device), seconds=60.0)
    arithmetic = resolve_precision(
        capabilities_of(world.device), gemm_shapes(cfg), cfg.precision, cfg.backend
    )
    layers = layers_of(arithmetic, cfg.fp8_min_dim)
    objective = build_objective(cfg, world.group, layers=layers, on_meta=True)
    step = TrainStep(cfg, objective.to_empty(device=world.device), world, arithmetic)
    batches = [draw_batch(cfg).to(world.device)] * cfg.parallel.accumulate
    for _ in range(cfg.num_steps):
        measured(step, *batches, monitor=False)


def main() -> None:
    """Run the case that the command line names."""
    recipe, *flags = sys.argv[1:]
    alone = "--step-alone" in flags
    if alone:
        flags.remove("--step-alone")
    plant = None
    if "--plant" in flags:
        at = flags.index("--plant")
        _, plant = flags[at], flags[at + 1]
        del flags[at : at + 2]
    has_lines = os.environ.get("NULL_CUDA_LINES") == "1"
    root = Path(os.environ.get("NULL_CUDA_ROOT", "/")) if has_lines else None
    steady = STEADY_ALONE if alone else STEADY
    measured = MeasuredSteps(steady, lines_below=root, plant=plant)
    cfg = case_config(recipe, flags)
    if alone:
        take_steps(cfg, measured)
    else:
        with tempfile.TemporaryDirectory() as folder:
            train(cfg, Path(folder) / "run", measured)
    sys.stdout.write(json.dumps(measured.memory) + "\n")


if __name__ == "__main__":
    main()
    release_last_backward()
