"""The trainer: one step that fits a screen, and the loop around it."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.engine import checkpoint
from m3i_fast.engine.ema import update_ema
from m3i_fast.engine.model import build_objective, stacks_of
from m3i_fast.engine.optim import build_optimizer, set_schedules
from m3i_fast.engine.parallel import StopFlag, average_whole, distribute, join_world
from m3i_fast.engine.precision import autocast, compute_dtype, resolve_device
from m3i_fast.engine.run import Resume, Run
from m3i_fast.engine.step import StepForward
from m3i_fast.objectives.mixing import Mix, draw_mix, step_seed
from m3i_fast.observe.collapse import CollapseError, CollapseWatch
from m3i_fast.observe.metrics import DeviceMeans, JsonlSink, Sink, StageTimer, TensorBoardSink
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader

logger = logging.getLogger(__name__)
Progress = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    step: int
    """Optimiser steps taken in all."""
    signal: int | None
    """The signal that ended the run before num_steps, if one did."""


class Trainer:
    """Trains `cfg` in `run_dir`.

    Raises FileExistsError when run_dir holds a run and `resume` is False, or one that is going on,
    FileNotFoundError when `resume` finds nothing, ValueError when no checkpoint is good or the
    config differs from the run's or does not fit the data; `train` raises FloatingPointError when
    a loss is not finite, OSError when a checkpoint cannot be written, and CollapseError after a
    checkpoint when `stop_on_collapse` and a monitor stays out of its healthy range; without it a
    collapse is a warning in the log.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        run_dir: Path,
        *,
        resume: Resume = False,
        stop_on_collapse: bool = False,
    ) -> None:
        self.cfg, self.run_dir, self.stop_on_collapse = cfg, run_dir, stop_on_collapse
        self.world = join_world(resolve_device(cfg.device))
        self.device, rank = self.world.device, self.world.rank
        self.seed = step_seed(cfg.seed, -rank) if rank else cfg.seed
        self.run = Run(run_dir, cfg)
        saved = self.run.found(resume, self.world.size)
        if cfg.num_threads:
            torch.set_num_threads(cfg.num_threads)
        self.loader = Loader(
            cfg.data,
            shard_id=rank,
            num_shards=self.world.size,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
        )
        self._check_data()
        torch.manual_seed(cfg.seed)
        with self.device:
            self.objective = build_objective(
                cfg, self.world.group, on_meta=self.world.spreads(cfg.parallel)
            )
        self.model = self._distribute()
        self.optimizer = build_optimizer(cfg.optim, self.objective)
        self.lr = cfg.optim.lr_schedule(cfg.num_steps)
        self.weight_decay = cfg.optim.weight_decay_schedule(cfg.num_steps)
        self.momentum = cfg.ema.schedule(cfg.num_steps)
        self.step = 0
        self.means = DeviceMeans(self.device, self.world.mean)
        self.watch = CollapseWatch(first_step=cfg.optim.warmup_steps(cfg.num_steps))
        self.world.wait_for_all()  # every rank has seen what was there before this run
        if saved is None:  # nothing is written before all of the above has worked
            self.run.begin()
        else:
            self._restore(saved)
        self.timer = StageTimer(self.device)
        self._stop = StopFlag(self.world)

    def _distribute(self) -> nn.Module:
        """The forward pass of a step, whose gradients the ranks reduce."""
        return distribute(
            StepForward(self.objective),
            stacks_of(self.objective),
            self.cfg.parallel,
            self.world,
            compute_dtype=compute_dtype(self.cfg.precision, self.device),
            copies=[average for average, _ in self.objective.momentum_pairs()],
        )

    def draw_mix(self, batch: Batch) -> Mix:
        """What this step mixes, hides and asks on this rank."""
        return draw_mix(
            self.cfg.objective.mixing,
            batch_size=batch.batch_size,
            grid=self.cfg.vision.grid,
            context_length=batch.token_ids.shape[1],
            seed=self.seed,
            step=self.step,
            num_steps=self.cfg.num_steps,
        ).to(self.device)

    def train_step(self, batch: Batch, *, monitor: bool = False) -> dict[str, Tensor]:
        """Schedules, targets, input, objective, backward, clip, step, EMA; waits for nothing."""
        cfg, stage, step = self.cfg, self.timer.stage, self.step
        # Stochastic depth draws from the global generator: seeding it by step makes a resume exact.
        torch.manual_seed(step_seed(self.seed, step))
        set_schedules(self.optimizer, lr=self.lr[step], weight_decay=self.weight_decay[step])
        mix, measure = self.draw_mix(batch), self.objective.balance.due(step)
        with autocast(cfg.precision, self.device):
            loss, metrics = self.model(batch, mix, stage, monitor=monitor, measure=measure)
        with stage("backward"):
            loss.backward()
        with stage("optim"):
            metrics["optim/grad_norm"] = self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.objective.clamp_temperatures()
            for pair in self.objective.momentum_pairs():
                update_ema(*pair, momentum=self.momentum[step])
        self.step += 1
        return metrics

    def train(
        self, progress: Progress = lambda step, values: None, *, max_seconds: float = math.inf
    ) -> Outcome:
        """Train to num_steps, or until SIGINT, SIGTERM or SIGUSR1 of any rank, or max_seconds.

        Either way a checkpoint of the last step is written.
        """
        ends = time.monotonic() + max_seconds
        cfg = self.cfg
        sinks = self._sinks()
        stopped: int | None = None
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        began, began_step = time.perf_counter(), self.step
        try:
            while self.step < cfg.num_steps and stopped is None:
                log = (self.step + 1) % cfg.log_every == 0 or self.step + 1 == cfg.num_steps
                with self.timer.stage("data"):
                    batch = next(self.loader).to(self.device)
                self.means.add(self.train_step(batch, monitor=log))
                self.timer.count_step()
                if log:
                    values = self._read_metrics(time.perf_counter() - began, self.step - began_step)
                    began, began_step = time.perf_counter(), self.step
                    for sink in sinks:
                        sink.log(self.step, values)
                    progress(self.step, values)
                    self._heed_collapse(values)
                if self.step % cfg.checkpoint_every == 0:
                    self.save()
                if time.monotonic() > ends:
                    self._stop.signal = self._stop.signal or signal.SIGUSR1
                stopped = self._stop.agreed()
            self._stop.wait()
            self.save()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            for sink in sinks:
                sink.close()
            self.loader.close()
            self.run.close()
        return Outcome(self.step, stopped)

    def _sinks(self) -> list[Sink]:
        """Of the first rank; the others' figures are in the means."""
        if not self.world.is_main:
            return []
        return [
            JsonlSink(self.run_dir / "metrics.jsonl", start_step=self.step),
            TensorBoardSink(self.run_dir / "tensorboard", start_step=self.step),
        ]

    def save(self) -> None:
        """Write a checkpoint, unless a loss since the last read was not finite."""
        check_finite(self.means.read(), self.step)
        state = self.run.state(loader=self.loader, means=self.means, watch=self.watch)
        state["num_ranks"] = self.world.size
        self.run.saver.save(
            step=self.step, model=self.objective, optimizer=self.optimizer, state=state
        )

    def _heed_collapse(self, values: dict[str, float]) -> None:
        found = self.watch.see(self.step, values)
        for collapse in found:
            logger.warning("collapse? %s", collapse)
        if found and self.stop_on_collapse:
            self.save()
            raise CollapseError(
                f"--stop-on-collapse: {found[0]}. The run is saved in {self.run.checkpoints}"
            )

    def _clip(self) -> Tensor:
        parameters = [p for p in self.objective.parameters() if p.grad is not None]
        average_whole(parameters, self.world)
        return self.optimizer.clip_grad_norm(parameters, self.cfg.optim.clip_grad_norm)

    def _read_metrics(self, seconds: float, num_steps: int) -> dict[str, float]:
        values = self.means.read()
        check_finite(values, self.step)
        self.means.reset()
        for name in values:
            if name.startswith("members/"):
                values[name] *= self.world.size
        values["optim/lr"] = float(self.lr[self.step - 1])
        values["optim/ema_momentum"] = float(self.momentum[self.step - 1])
        images = num_steps * self.cfg.data.batch_size * self.world.size
        values["throughput/img_s"] = images / seconds
        if self.device.type == "cuda":
            values["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return values | self.timer.read()

    def _check_data(self) -> None:
        manifest = self.loader.manifest
        facts = {
            "num_classes": (self.cfg.num_classes, len(manifest.class_names)),
            "text.vocab_size": (self.cfg.text.vocab_size, manifest.tokenizer.vocab_size),
            "text.context_length": (
                self.cfg.text.context_length,
                manifest.tokenizer.context_length,
            ),
        }
        for name, (got, expected) in facts.items():
            if got != expected:
                raise ValueError(
                    f"{name}: expected {expected} as the data in {self.cfg.data.path}, got {got}"
                )

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        saved.load_model(self.objective)
        saved.load_optimizer(self.objective, self.optimizer)
        state = saved.state()
        before, now = state.get("num_ranks", 1), self.world.size
        if before == now:
            self.run.restore(state, loader=self.loader, means=self.means, watch=self.watch)
        else:
            epoch = self.loader.restart_epoch(state["loader"])
            logger.warning(
                "THE DATA STARTS AGAIN at the beginning of epoch %d: %d ranks saved, %d go on, and "
                "a position in the data is of one number of ranks. Weights, moments, averages and "
                "schedules go on where they were.",
                epoch,
                before,
                now,
            )
        self.step = saved.step
        logger.info("resumed %s at step %d", self.run_dir, self.step)

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self._stop.signal is not None:
            raise KeyboardInterrupt
        self._stop.signal = number
        logger.warning("signal %d: finishing the step and saving; once more stops at once", number)


def check_finite(values: dict[str, float], step: int) -> None:
    """Raise FloatingPointError that names every loss that is NaN or infinite."""
    wrong = {k: v for k, v in values.items() if k.startswith("loss/") and not math.isfinite(v)}
    if wrong:
        raise FloatingPointError(
            f"step {step}: not finite: {wrong}; no checkpoint is written from here, the last one "
            f"is good. A lower "
            "optim.lr or a longer optim.warmup_fraction usually helps"
        )
