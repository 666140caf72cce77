"""The trainer: the loop around a training step, and what a run logs and saves."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from m3i_fast.config import TrainConfig
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.guard.guard import not_finite
from m3i_fast.engine.guard.skipped_steps import SkippedSteps
from m3i_fast.engine.initial_weights import INIT_FILE, begin_from_weights
from m3i_fast.engine.live_evaluation import LiveEvaluation, UnreadableRowsError
from m3i_fast.engine.open_loader import open_loader
from m3i_fast.engine.parallel.ranks import StopFlag, join_world, leave_world
from m3i_fast.engine.parallel.watchdog import A_STEP, INIT_MINUTES, Watchdog
from m3i_fast.engine.precision.arithmetic import (
    capabilities_of,
    log_arithmetic,
    resolve_device,
    resolve_precision,
)
from m3i_fast.engine.precision.attention import choose_attention
from m3i_fast.engine.precision.determinism import make_deterministic
from m3i_fast.engine.run.data_fields import expect_data, take_data_fields
from m3i_fast.engine.run.data_record import DataRecord, record_data
from m3i_fast.engine.run.directory import Data, Resume, Run, Stateful
from m3i_fast.engine.run.log import RunLog
from m3i_fast.engine.teacher_cache import cache_teachers
from m3i_fast.engine.train_step import build_train_step
from m3i_fast.observe.collapse import CollapseError, CollapseWatch
from m3i_fast.observe.metrics import Ended
from m3i_fast.pipelines.any_shape.batch import AnyBatch
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.loader import BatchesOfRun, Loader
from m3i_fast.pipelines.storage.shards import BucketReads

logger = logging.getLogger(__name__)
Progress = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a run got, and the signal that ended it, if one did."""

    step: int
    """Number of optimiser steps that were taken, earlier parts of the run included."""
    signal: int | None
    """Signal that ended the run before num_steps; None for a run that is complete."""


def train(
    cfg: TrainConfig,
    out: str | os.PathLike[str],
    progress: Progress = lambda step, values: None,
    *,
    resume: Resume = False,
    new_num_steps: bool = False,
    new_batch_size: bool = False,
    stop_on_collapse: bool = False,
) -> Outcome:
    """Train a config in the run directory `out`, as `m3i-fast train` does, but for its limits.

    How many classes, token ids and tokens there are is taken from the data's manifest. progress:
    called with every logged row, its step and metrics; those of an evaluation, with
    `cfg.evaluate_every`, are a row of their own. resume: continue the run in `out`; auto: continue
    it if there is one; new_num_steps, new_batch_size: it may have other ones, as where their flags
    are typed. stop_on_collapse: raise `CollapseError`, after a checkpoint, when a monitor stays out
    of its healthy range. Under torchrun, or `m3i-fast launch`, every rank calls this.

    There is no limit of time and no watchdog: a run that hangs hangs, and what a GPU's errors mean
    is not told. `m3i-fast train`, or `Trainer` for the former, has them. As it does, it leaves
    behind in the process what the config asks of it: the seed of torch's generators, its number of
    threads, and with `deterministic` its deterministic algorithms and their environment variables.
    Raises TypeError for a config of another type, and as `take_data_fields` and `Trainer`; an error
    of one rank has to end its process (`os._exit`), as the others wait for it.
    """
    if not isinstance(cfg, TrainConfig):
        raise TypeError(
            "cfg: expected a TrainConfig, such as m3i_fast.recipes.recipes()['demo'](), got "
            f"{cfg!r}"
        )
    had_joined = dist.is_initialized()
    trainer = Trainer(
        take_data_fields(cfg),
        Path(out),
        resume=resume,
        new_num_steps=new_num_steps,
        new_batch_size=new_batch_size,
        stop_on_collapse=stop_on_collapse,
    )
    outcome = trainer.train(progress)
    if not had_joined:
        del trainer  # its model holds the ranks' group
        leave_world()
    return outcome


class Trainer:
    """Trains `cfg` in `run_dir`, on the shards of its config or on `data` in their place.

    Raises FileExistsError when run_dir holds a run and `resume` is False, or a run that another
    process trains; FileNotFoundError when `resume` finds no run; ValueError when no checkpoint is
    good, or when the config differs from the run's or does not fit the data.

    `train` raises FloatingPointError when too many steps had to be skipped or a weight is not
    finite, OSError when a checkpoint cannot be written, and CollapseError, after a checkpoint, when
    `stop_on_collapse` is set and a monitor stays out of its healthy range. Without it a collapse is
    a warning in the log.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        run_dir: Path,
        *,
        resume: Resume = False,
        new_num_steps: bool = False,
        new_batch_size: bool = False,
        stop_on_collapse: bool = False,
        recipe: str = "",
        data: Data | None = None,
        join_seconds: float = 60 * INIT_MINUTES,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Join the world, and build or restore the run.

        new_num_steps: whether a resume takes cfg.num_steps in place of the run's own; what that
        changes of its schedules is logged. new_batch_size: whether a resume on as many ranks may
        take more or fewer samples a step; on others it may, and either is logged.
        recipe: name of the run for Prometheus. join_seconds: limit within which all ranks join, or
        `MissingRanks` is raised. on_progress: called with each batch that a teacher's cache is
        filled from, which may take hours in all.
        """
        self.cfg, self.run_dir, self.stop_on_collapse = cfg, run_dir, stop_on_collapse
        device = resolve_device(cfg.device)
        if cfg.deterministic:
            make_deterministic(cfg, device)
        self.world = join_world(device, seconds=join_seconds)
        self.device = self.world.device
        self.arithmetic = resolve_precision(
            capabilities_of(self.device),
            gemm_shapes(cfg),
            cfg.precision,
            cfg.backend,
            compiled=cfg.compile,
        )
        log_arithmetic(self.arithmetic)
        self.attention = choose_attention(cfg, self.arithmetic, self.device)
        self.run = Run(run_dir, cfg, new_num_steps=new_num_steps, new_batch_size=new_batch_size)
        with ExitStack() as opened:  # closes what is open where the rest of this fails
            opened.callback(self.run.close)
            saved = self.run.find_checkpoint(resume, self.world.size)
            if cfg.num_threads:
                torch.set_num_threads(cfg.num_threads)
            self.loader: Data = self._open_shards() if data is None else data
            opened.callback(self.loader.close)
            self.evaluation = LiveEvaluation(cfg, self.world) if cfg.evaluate_every else None
            self.log = RunLog(
                cfg,
                run_dir,
                self.world,
                self.arithmetic,
                recipe=recipe,
                is_resumed=saved is not None,
                bucket_reads=self._bucket_reads,
            )
            self.skips = SkippedSteps(cfg, run_dir, self.world)
            self.train_step = build_train_step(
                cfg,
                self.world,
                self.arithmetic,
                stage=self.log.timer.stage,
                lr_scale=self.skips.lr_scale,
            )
            self.objective, self.optimizer = self.train_step.objective, self.train_step.optimizer
            self.guard = self.train_step.guard
            if cfg.objective.teacher_cache is not None and isinstance(self.loader, Loader):
                self.loader.features = cache_teachers(
                    cfg,
                    self.objective.teachers,
                    self.loader,
                    self.world,
                    self.arithmetic,
                    on_progress,
                )
            self.watch = CollapseWatch(first_step=cfg.optim.warmup_steps(cfg.num_steps))
            fresh = saved is None
            self.initial = begin_from_weights(cfg, self.objective, self.world) if fresh else None
            self.world.wait_for_all()  # every rank has looked at the directory before it changes
            if saved is None:  # nothing is written before all of the above has succeeded
                self.run.begin(self._data_record(), attention=self.attention.kernel)
                if self.initial is not None and self.world.is_main:
                    self.initial.save(run_dir / INIT_FILE)
            else:
                self._restore(saved)
            self._stop = StopFlag(self.world)
            self._watchdog = Watchdog(Path(), seconds=math.inf)
            opened.pop_all()

    def _open_shards(self) -> Loader | PackedLoader:
        loader = open_loader(
            self.cfg,
            rank=self.world.rank,
            num_ranks=self.world.size,
            device_id=(self.device.index or 0) if self.device.type == "cuda" else None,
            skipped_file=self.run_dir / "skipped_samples.jsonl",
        )
        expect_data(self.cfg, loader.described)
        return loader

    def _bucket_reads(self) -> BucketReads | None:
        return self.loader.bucket_reads() if isinstance(self.loader, BatchesOfRun) else None

    def _data_record(self) -> DataRecord | None:
        """Return what the run keeps of its shards; None of data that stand in for them."""
        if not isinstance(self.loader, BatchesOfRun):
            return None
        return record_data(self.cfg, self.loader.described)

    @property
    def step(self) -> int:
        """Return the number of optimiser steps taken, earlier parts of the run included."""
        return self.train_step.steps_taken

    @property
    def doing(self) -> str:
        """Return what the run does now, for a reader on another thread.

        That is the innermost open stage of a step, such as data.wait, or what takes longer than
        one, such as "a save" or "an evaluation".
        """
        longer = self._watchdog.doing
        return longer if longer != A_STEP else self.log.timer.innermost or A_STEP

    def next_step(self, data: Iterator[AnyBatch] | None = None, *, monitor: bool = False) -> None:
        """Take a step on the next batches, as `train` repeats it; the host waits for data alone.

        data: source of the batches; the trainer's loader where it is None.
        """
        source, stage = self.loader if data is None else data, self.log.timer.stage
        batches = []
        for _ in range(self.cfg.parallel.accumulate):
            with stage("data.wait"):
                batch = next(source)
            with stage("h2d"):
                batches.append(batch.to(self.device))
        metrics = self.train_step(*batches, monitor=monitor)
        self.log.count(batches)
        with stage("log"):
            self.log.add(metrics, self.guard.skip)

    def train(
        self,
        progress: Progress = lambda step, values: None,
        *,
        max_seconds: float = math.inf,
        watchdog_seconds: float = math.inf,
    ) -> Outcome:
        """Train to num_steps, or to SIGINT, SIGTERM or SIGUSR1 of any rank, or max_seconds.

        In each case a checkpoint of the last step is written. watchdog_seconds: after so long
        without a completed step the process ends, with its stacks in the run's directory
        (`Watchdog`). Python delivers signals to its main thread alone: on another thread they do
        what they would do without a run.
        """
        stacks = self.run_dir / f"stacks-rank{self.world.rank}.txt"
        ended: Ended = "failed"
        with self._signals_handled(), Watchdog(stacks, seconds=watchdog_seconds) as self._watchdog:
            try:
                outcome = self._train(progress, time.monotonic() + max_seconds)
                ended = "complete" if outcome.signal is None else "stopped"
                return outcome
            finally:
                with self._watchdog.allow_longer("the end of the run"):
                    self.close(ended)

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        is_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if is_main else ()
        previous = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def close(self, ended: Ended = "complete") -> None:
        """Wait for the save in flight, release the directory and stop the loader's threads.

        Trackers are told how the run `ended`, last, since they may keep it waiting.
        """
        with ExitStack() as closing:  # each of them whatever the others raise, the last one first
            closing.callback(self.log.close, ended)
            closing.callback(self.loader.close)
            closing.callback(self.run.close)

    def _train(self, progress: Progress, ends: float) -> Outcome:
        stopped = None
        self.log.open(self.step)
        while self.step < self.cfg.num_steps and stopped is None:
            self.advance(progress)
            if self.step % self.cfg.checkpoint_every == 0:
                self.save()
            if time.monotonic() > ends:
                self._stop.signal = self._stop.signal or signal.SIGUSR1
            stopped = self._stop.agreed()
        self._stop.wait()
        self.save()
        return Outcome(self.step, stopped if self.step < self.cfg.num_steps else None)

    def advance(self, progress: Progress = lambda step, values: None) -> None:
        """Take the run's next step, and read and log metrics where they are due."""
        log = (self.step + 1) % self.cfg.log_every == 0 or self.step + 1 == self.cfg.num_steps
        self.next_step(monitor=log)
        self._watchdog.beat()
        step = self.step
        if log:
            with self.log.timer.stage("log"):
                self._log(progress)
        if self.evaluation is not None and self.evaluation.is_due(step) and self.step == step:
            self._evaluate(self.evaluation, progress)  # not after a rollback

    def _evaluate(self, evaluation: LiveEvaluation, progress: Progress) -> None:
        """Log the values of the live model as a row of their own, outside of all other times.

        Where that raises, a checkpoint of this step is written first, so that a resume goes on
        behind it.
        """
        try:
            with self._watchdog.allow_longer("an evaluation"), self.log.outside_of_steps():
                began = time.monotonic()
                with self.log.timer.mark("evaluate"):
                    values = evaluation.measure(self.objective, self.train_step.model)
                values["evaluate/seconds"] = time.monotonic() - began
                self.log.write(self.step, values)
                progress(self.step, values)
        except Exception as error:
            # Every rank has to save, and only of the former all are known to be here.
            if isinstance(error, UnreadableRowsError) or self.world.size == 1:
                logger.error("the evaluation at step %d failed; the run is saved first", self.step)
                self.save()
            raise

    def _log(self, progress: Progress) -> None:
        """Read the metrics, log them and act on skipped steps, spikes and collapses."""
        self.run.expect_in_place()
        values = self.log.read(self.step)
        spiked, values["guard/skipped"] = self._handle_skips()
        values["optim/lr"] = self.train_step.lr_at(self.step - 1)
        values["optim/ema_momentum"] = self.train_step.momentum_at(self.step - 1)
        self.log.write(self.step, values)
        progress(self.step, values)
        self._report_collapse(values)
        if spiked is not None:
            with self._watchdog.allow_longer("a rollback"):
                self._roll_back(spiked)
        self.log.count_from(self.step)

    def save(self) -> None:
        """Write a checkpoint; raise FloatingPointError if a value of it is not finite."""
        with self._watchdog.allow_longer("a save"), self.log.timer.stage("ckpt"):
            self._save()

    def _save(self) -> None:
        self.run.expect_in_place()
        self._expect_finite("no checkpoint is written")
        state = self.run.state(loader=self.loader, **self._stateful_parts())
        state["num_ranks"] = self.world.size
        self.run.saver.save(
            step=self.step, model=self.objective, optimizer=self.optimizer, state=state
        )

    def _expect_finite(self, consequence: str) -> None:
        """Raise FloatingPointError if a value of weights or optimiser state is not finite."""
        tensors = checkpoint.tensors_of(self.objective, self.optimizer)
        if wrong := not_finite(tensors, self.world):
            raise self._abort(f"{consequence}: not finite: {', '.join(wrong)}")

    def _report_collapse(self, values: dict[str, float]) -> None:
        for hint in self.watch.new_hints(self.step, values):
            logger.warning("hint: %s", hint)
        collapses = self.watch.new_collapses(self.step, values)
        for collapse in collapses:
            logger.warning("collapse? %s", collapse)
        if collapses and self.stop_on_collapse:
            self.save()
            raise CollapseError(
                f"--stop-on-collapse: {collapses[0]}. The run is saved in {self.run.checkpoints}"
            )

    def _handle_skips(self) -> tuple[int | None, int]:
        """Return the first spike to roll back to, and the number of newly skipped steps."""
        steps, records = self.guard.drain()
        self.skips.record(steps, records)
        if reason := self.skips.excess():
            raise self._abort(reason)
        self._expect_finite("no checkpoint could be written")
        spikes = [record["step"] for record in records if record["reason"] == "spike"]
        goes_back = self.cfg.guard.spikes == "rollback" and bool(spikes)
        return (spikes[0] if goes_back else None), len(records)

    def _roll_back(self, spike: int) -> None:
        """Load the newest good checkpoint of at most `spike` steps; the data continue."""
        limit, now = self.cfg.guard.max_rollbacks, self.step
        if self.skips.rollbacks >= limit:
            raise self._abort(
                f"a spike at step {spike} after {self.skips.rollbacks} rollbacks, "
                f"--guard.max-rollbacks {limit}"
            )
        saved = self.run.roll_back(spike)
        if saved is None:
            logger.warning(
                "spike at step %d: SKIPPED, NOT ROLLED BACK: no checkpoint before it", spike
            )
            return
        self.optimizer.state.clear()
        saved.load_model(self.objective)
        saved.load_optimizer(self.objective, self.optimizer)
        if self.train_step.graph is not None:
            self.train_step.graph.reset()  # the state's tensors are others
        state = saved.state()
        if "guard" in state:
            self.guard.rewind(state["guard"])
        self.watch.load_state_dict(state.get("watch", {}))
        self.skips.rolled_back()
        self.train_step.steps_taken = saved.step
        self.world.wait_for_all()
        self.log.open(self.step)
        logger.warning(
            "ROLLED BACK to step %d, from step %d, for the spike at step %d (%d of %d rollbacks): "
            "the batches of those %d steps are skipped, and the data continue",
            saved.step,
            now,
            spike,
            self.skips.rollbacks,
            limit,
            now - saved.step,
        )

    def _abort(self, reason: str) -> FloatingPointError:
        self.skips.record(*self.guard.drain())
        return self.skips.abort(self.step, reason, self.objective, self.optimizer)

    def _stateful_parts(self) -> dict[str, Stateful]:
        """Return what a checkpoint saves beside tensors and the position in the data."""
        return {
            "means": self.log.means,
            "log": self.log,
            "watch": self.watch,
            "guard": self.guard,
            "skips": self.skips,
        }

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        saved.load_model(self.objective)
        saved.load_optimizer(self.objective, self.optimizer)
        state = saved.state()
        self.run.restore(
            state, num_ranks=self.world.size, loader=self.loader, **self._stateful_parts()
        )
        self.train_step.steps_taken = saved.step
        self.train_step.samples_taken = self.loader.samples
        self.skips.forget_after(self.guard.first_unreported(self.step))
        self.run.write_changes(self._data_record())
        logger.info(
            "resumed %s at step %d, after %d samples",
            self.run_dir,
            self.step,
            self.train_step.samples_taken,
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self._stop.signal is None:
            self._stop.signal = number
            logger.warning("signal %d: finishing the step and saving; Ctrl-C stops at once", number)
        elif number == signal.SIGINT:  # a scheduler and torchrun may both send SIGTERM
            raise KeyboardInterrupt
