"""What a run measures between two reads of its metrics, and where it is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel import World
from m3i_fast.observe.metrics import DeviceMeans, JsonlSink, Sink, TensorBoardSink
from m3i_fast.observe.stages import StageTimer


class RunLog:
    """Means and times of the steps since the last read; the first rank writes them."""

    def __init__(self, cfg: TrainConfig, run_dir: Path, world: World) -> None:
        self._cfg, self._run_dir, self._world = cfg, run_dir, world
        self.means = DeviceMeans(world.device, world.mean)
        self.timer = StageTimer(world.device)
        self._sinks: list[Sink] = []
        self._best = float("nan")

    def open(self, step: int) -> None:
        """Write from here on; rows of later steps, of before a resume or rollback, are dropped."""
        self.close()
        if self._world.is_main:
            self._sinks = [
                JsonlSink(self._run_dir / "metrics.jsonl", start_step=step),
                TensorBoardSink(self._run_dir / "tensorboard", start_step=step),
            ]
        self.count_from(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def count_from(self, step: int) -> None:
        """Throughput is of the steps from this one on."""
        self._began, self._began_step = time.perf_counter(), step

    def add(self, metrics: Mapping[str, Tensor], skip: Tensor) -> None:
        """A step's; left out of the means where `skip` [] is 1."""
        self.means.add(metrics, skip)
        self.timer.count_step()

    def read(self, step: int) -> dict[str, float]:
        """Means over steps and ranks, sums of members, images a second of all ranks, times."""
        seconds, num_steps = time.perf_counter() - self._began, step - self._began_step
        values = self.means.read()
        self.means.reset()
        for name in values:
            if name.startswith("members/"):
                values[name] *= self._world.size
        num_batches = num_steps * self._cfg.parallel.accumulate * self._world.size
        values["throughput/img_s"] = num_batches * self._cfg.data.batch_size / seconds
        if self._world.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values | self.timer.read()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, values)
        name = self._cfg.keep_best.removeprefix("+")
        if name in values:
            self._best = values[name]
        elif name and "loss/total" in values:  # else all steps were skipped
            raise ValueError(
                f"keep_best: expected one of the logged metrics, {', '.join(sorted(values))}, got "
                f"{name!r}"
            )

    @property
    def score(self) -> float | None:
        """Of a checkpoint of now, by keep_best: the lower the better; None: of no account."""
        if self._best != self._best:
            return None
        return -self._best if self._cfg.keep_best.startswith("+") else self._best

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        score = state["score"]
        if score is not None:
            self._best = -score if self._cfg.keep_best.startswith("+") else score
