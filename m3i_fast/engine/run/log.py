"""What a run measures between two reads of its metrics, and where the rows are written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.engine.run.counted_pictures import CountedPictures
from m3i_fast.engine.run.telemetry import LogInterval, RunTelemetry
from m3i_fast.observe.metrics import DeviceMeans, Ended, JsonlSink, Sink, TensorBoardSink
from m3i_fast.observe.sinks.live import LiveSinks, expect_live_sinks, open_live_sinks
from m3i_fast.observe.stages import StageTimer
from m3i_fast.pipelines.any_shape.batch import AnyBatch
from m3i_fast.pipelines.storage.shards import BucketReads

_ALWAYS_IN = {False: "loss/total", True: "evaluate/seconds"}  # a row of steps, of an evaluation


class RunLog:
    """Means and times of the steps since the last read; the first rank writes them."""

    def __init__(
        self,
        cfg: TrainConfig,
        run_dir: Path,
        world: World,
        arithmetic: Arithmetic,
        *,
        recipe: str = "",
        is_resumed: bool = False,
        bucket_reads: Callable[[], BucketReads | None] = lambda: None,
    ) -> None:
        """Check the telemetry; raise ValueError or OSError as `expect_live_sinks` does.

        bucket_reads: returns what the rank has read from object storage so far, None on all ranks
        where they read local data.
        """
        if world.is_main:
            expect_live_sinks(cfg.telemetry, is_new=not is_resumed)
        self._recipe = recipe
        self._cfg, self._run_dir, self._world = cfg, run_dir, world
        self.means = DeviceMeans(world.device, world.mean, world.gather)
        self.timer = StageTimer(world.device)
        self._telemetry = RunTelemetry(cfg, world, arithmetic)
        self._sinks: list[Sink] = []
        self._live: LiveSinks | None = None
        self._best = float("nan")
        self._peak_bytes = 0  # before the last time outside of steps
        self._bucket_reads, self._reads_before = bucket_reads, BucketReads()
        self._counted = CountedPictures(cfg)

    def open(self, step: int) -> None:
        """Open the files at `step`, and drop rows of later steps (resume, rollback)."""
        self._close_files()
        self._telemetry.start()
        if self._world.is_main:
            self._live = self._live or self._open_live()  # a rollback finds it open
            self._sinks = [
                JsonlSink(self._run_dir / "metrics.jsonl", start_step=step),
                TensorBoardSink(self._run_dir / "tensorboard", start_step=step),
            ]
        self.count_from(step)

    def close(self, ended: Ended = "complete") -> None:
        """Stop the telemetry and close all sinks; trackers are told how the run ended."""
        live, self._live = self._live, None
        with ExitStack() as closing:
            if live is not None:
                closing.callback(live.close, ended)
            closing.callback(self._close_files)
            closing.callback(self._telemetry.stop)

    def _open_live(self) -> LiveSinks:
        return open_live_sinks(
            self._cfg.telemetry,
            self._run_dir,
            recipe=self._recipe,
            rank=self._world.rank,
            config=json.loads(self._cfg.to_json()),
        )

    def _close_files(self) -> None:
        sinks, self._sinks = self._sinks, []
        with ExitStack() as closing:
            for sink in sinks:
                closing.callback(sink.close)

    def count_from(self, step: int) -> None:
        """Start the interval that throughput is measured over at this step."""
        self._began, self._began_step = time.monotonic(), step
        self._counted = CountedPictures(self._cfg)
        self._left_out: list[tuple[float, float]] = []

    @contextmanager
    def outside_of_steps(self) -> Iterator[None]:
        """Leave what is done meanwhile out of throughput, energy and peak memory.

        On a GPU the host waits first for what is queued, which belongs to the steps.
        """
        on_gpu = self._world.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self._world.device)
            self._peak_bytes = self._highest_bytes()
        began = time.monotonic()
        try:
            yield
        finally:
            self._left_out.append((began, time.monotonic()))
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self._world.device)

    def _highest_bytes(self) -> int:
        return max(self._peak_bytes, torch.cuda.max_memory_allocated(self._world.device))

    def add(self, metrics: Mapping[str, Tensor], skip: Tensor) -> None:
        """Add the metrics of a step to the means, unless the flag `skip` [] is 1."""
        self.means.add(metrics, skip)
        self.timer.count_step()

    def count(self, batches: Sequence[AnyBatch]) -> None:
        """Count what a step's batches hold, where their number of samples is not the config's."""
        if self._cfg.data.any_shape:
            self._counted.add(batches, self._world.size)

    def read(self, step: int) -> dict[str, float]:
        """Return the row of the interval since the last read.

        It holds means over steps and ranks, sums of members, images a second of all ranks, the
        highest memory of any, times of this rank's stages, reads of a bucket and, on the first
        rank, the values of `RunTelemetry`.
        """
        now, num_steps = time.monotonic(), step - self._began_step
        values = self.means.read()
        self.means.reset()
        for name in values:
            if name.startswith("members/"):
                values[name] *= self._world.size
        num_batches = num_steps * self._cfg.parallel.accumulate * self._world.size
        num_images = num_batches * self._cfg.data.batch_size
        if self._cfg.data.any_shape:
            num_images = self._counted.num_images
            tokens = self._tokens_of_ranks()
            values["batch/images"] = num_images / num_batches
            values["batch/tokens"] = tokens / num_batches
            values["throughput/tokens_s"] = tokens / self._seconds_of_steps(now)
        values["throughput/img_s"] = num_images / self._seconds_of_steps(now)
        if self._world.device.type == "cuda":
            of_ranks = self._world.gather(self._highest_bytes())
            values["memory/peak_gib"] = max(of_ranks) / 2**30
        if self._world.is_main:
            interval = LogInterval(
                begin_s=self._began,
                end_s=now,
                left_out=tuple(self._left_out),
                num_images=num_images,
                progress=step / self._cfg.num_steps,
                pictures=self._counted.pictures,
            )
            values |= self._telemetry.values(interval)
        return values | self._bucket_values() | self.timer.read()

    def _tokens_of_ranks(self) -> int:
        """Return the patches of the interval's views, of all ranks."""
        return sum(self._world.gather(self._counted.num_tokens))

    def _seconds_of_steps(self, now: float) -> float:
        return now - self._began - sum(end - began for began, end in self._left_out)

    def _bucket_values(self) -> dict[str, float]:
        """Return what all ranks read from object storage since the last read; {} where none do.

        Counts are sums over ranks; the wait is in seconds, the mean over ranks.
        """
        reads = self._bucket_reads()
        if reads is None:
            return {}
        before, self._reads_before = self._reads_before, reads
        own = [now - then for now, then in zip(astuple(reads), astuple(before), strict=True)]
        total = sum((BucketReads(*of_rank) for of_rank in self._world.gather(own)), BucketReads())
        return {
            "bucket/read_gib": total.read_bytes / 2**30,
            "bucket/requests": float(total.requests),
            "bucket/retries": float(total.retries),
            "bucket/cache_hits": float(total.cache_hits),
            "bucket/cache_gib": total.cache_bytes / 2**30,
            "bucket/wait_s": total.wait_s / self._world.size,
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write a row to all sinks; raise ValueError where keep_best names no logged metric.

        Of the metrics that the first rank alone has, as of its GPU, the others keep no best one.
        """
        for sink in self._sinks:
            sink.log(step, values)
        if self._live is not None:
            self._live.log(step, values)
        if not self._world.is_main:
            return
        name = self._cfg.keep_best.removeprefix("+")
        if name in values:
            self._best = values[name]
        elif name and _ALWAYS_IN[name.startswith("evaluate/")] in values:  # not all steps skipped
            raise ValueError(
                f"keep_best: expected one of the logged metrics, {', '.join(sorted(values))}, got "
                f"{name!r}"
            )

    @property
    def score(self) -> float | None:
        """Return the score of a checkpoint by keep_best, lower is better; None without one."""
        if self._best != self._best:
            return None
        return -self._best if self._cfg.keep_best.startswith("+") else self._best

    def state_dict(self) -> dict[str, Any]:
        """Return the score as JSON-able state."""
        return {"score": self.score}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the score."""
        score = state["score"]
        if score is not None:
            self._best = -score if self._cfg.keep_best.startswith("+") else score
