"""A run's directory: config.json, env.json, run.lock and checkpoints/, held by one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from m3i_fast.config import TrainConfig, differences
from m3i_fast.durable_files import make_directories
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint, checkpoints, latest, on_first_rank
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.run.extension import log_new_num_steps
from m3i_fast.engine.run.lock import RunLock
from m3i_fast.engine.run.random_state import random_state, set_random_state
from m3i_fast.observe.environment import environment
from m3i_fast.pipelines.batch import Batch

logger = logging.getLogger(__name__)

T = TypeVar("T")
Resume = bool | Literal["auto"]
"""Whether a run that is there goes on; auto: if there is one, else it begins."""


class Stateful(Protocol):
    """What goes on where its state was taken; the state is JSON-able."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> object: ...


class Data(Stateful, Protocol):
    """Where a trainer's batches come from: `pipelines.loader.Loader`, or what stands for it."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def restart_epoch(self, state: dict[str, Any]) -> int: ...

    def close(self) -> None: ...


class Run:
    """One process trains in a directory at a time: `begin` or `resume` takes it, `close` frees it.

    Of several ranks the first holds the lock and writes.
    """

    def __init__(self, path: Path, cfg: TrainConfig, *, new_num_steps: bool = False) -> None:
        """new_num_steps: whether num_steps may differ from that of the run that is resumed."""
        self.path, self._cfg, self._lock = path, cfg, RunLock(path)
        self._new_num_steps = new_num_steps
        self._again = False  # a run is there that ended before its first checkpoint
        self.checkpoints = path / "checkpoints"
        self.saver = Saver(
            self.checkpoints,
            keep=cfg.keep_checkpoints,
            keep_every=cfg.keep_every,
            keep_best=bool(cfg.keep_best),
            background=cfg.async_checkpoint,
        )

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    def expect_new(self) -> None:
        """FileExistsError when the directory holds a run that does not begin again."""
        if self.config_path.exists() and not self._again:
            raise FileExistsError(
                f"{self.path} holds a run already: add --resume to continue it, or name another "
                "--out"
            )

    def expect_there(self) -> None:
        """OSError on the first rank when the directory that this run took is not where it was."""
        if self.saver.is_first and (not self.config_path.exists() or self._lock.is_anothers()):
            raise OSError(
                f"{self.path}: the run's directory was deleted, moved or replaced while it trained"
            )

    def found(self, resume: Resume, num_ranks: int = 1) -> Checkpoint | None:
        """The checkpoint to go on from; None where the run is to `begin`.

        Raises FileExistsError and FileNotFoundError where there is what should not be there, or is
        not what should; with auto neither, but all that `resume` raises of a run that is there.
        """
        if resume == "auto":
            there = on_first_rank(self.saver.group, self._look)
            self._again, resume = there == "begun", there == "saved"
        if resume:
            return self.resume(num_ranks)
        self.expect_new()
        return None

    def _look(self) -> Literal["nothing", "begun", "saved"]:
        if not self.config_path.exists():
            logger.info("--auto-resume: no run in %s: it begins", self.path)
            return "nothing"
        self._go_on()
        if checkpoints(self.checkpoints):
            return "saved"
        logger.warning(
            "--auto-resume: the run in %s ended before its first checkpoint: it begins again",
            self.path,
        )
        return "begun"

    def begin(self) -> None:
        """Make the directory of a new run."""
        on_first_rank(self.saver.group, self._begin)

    def resume(self, num_ranks: int = 1) -> Checkpoint:
        """The newest good checkpoint of the run that is there, to go on with so many ranks."""
        num_steps = on_first_rank(self.saver.group, self._go_on)
        saved = latest(self.checkpoints, self.saver.group)
        self._expect_batch(saved.state(), num_ranks)
        if num_steps != self._cfg.num_steps:
            on_first_rank(
                self.saver.group,
                lambda: log_new_num_steps(self._cfg, before=num_steps, steps_taken=saved.step),
            )
        self.saver.saved_step = saved.step
        return saved

    def roll_back(self, step: int) -> Checkpoint | None:
        """The newest good checkpoint of at most so many steps, later ones gone; None: none is.

        All ranks call this, after which a resume would begin there.
        """
        self.saver.wait()
        try:
            saved = latest(self.checkpoints, self.saver.group, up_to=step)
        except (FileNotFoundError, ValueError):
            return None
        self.saver.forget_after(saved)
        return saved

    def _expect_batch(self, state: dict[str, Any], num_ranks: int) -> None:
        """The batch of all ranks stays what it was, whatever their number."""
        before = state.get("num_ranks", 1)
        saved = state.get("config", {"data": {"batch_size": self._cfg.data.batch_size}})
        batches = before * saved.get("parallel", {}).get("accumulate", 1)
        whole = saved["data"]["batch_size"] * batches
        mine = num_ranks * self._cfg.parallel.accumulate
        if self._cfg.data.batch_size * mine != whole:
            raise ValueError(
                f"--data.batch-size: expected {whole / mine:g}, with which {num_ranks} ranks make "
                f"the batch of {whole} that {before} made with --parallel.accumulate "
                f"{batches // before}, got {self._cfg.data.batch_size} and --parallel.accumulate "
                f"{self._cfg.parallel.accumulate}"
            )

    def _begin(self) -> None:
        make_directories(self.path)
        self._lock.acquire()
        self.expect_new()
        environment().save(self.path / "env.json")
        self._cfg.save(self.config_path)

    def _go_on(self) -> int:
        """Take the directory of a run with this config, and return the num_steps it had."""
        if not self.config_path.exists():
            raise FileNotFoundError(f"--resume: no run in {self.path}: expected {self.config_path}")
        self._lock.acquire()
        # How a run is spread over ranks and what it tells change nothing of it; the batch is seen
        # to in `resume`.
        damaged: ValueError | None = None
        try:
            saved, source = TrainConfig.load(self.config_path), self.config_path
        except ValueError as error:
            damaged = error
            saved, source = self._config_of_checkpoint(error)
        data = replace(saved.data, batch_size=self._cfg.data.batch_size)
        saved = replace(
            saved, data=data, parallel=self._cfg.parallel, telemetry=self._cfg.telemetry
        )
        self._expect_same(saved, source)
        if damaged is not None:
            logger.warning("%s: written anew, as %s has it", damaged, source)
            saved.save(self.config_path)
        return saved.num_steps

    def _expect_same(self, saved: TrainConfig, source: Path) -> None:
        """Raise ValueError for the fields in which the run was of another config."""
        asked, hint = self._cfg, ""
        if self._new_num_steps:
            asked = replace(asked, num_steps=saved.num_steps)
        elif asked.num_steps != saved.num_steps:
            hint = (
                f" (--num-steps {saved.num_steps} goes on to where it was to end; any other that "
                "is typed is taken, and what it changes is told)"
            )
        if found := differences(saved, asked):
            raise ValueError(
                f"--resume: the config differs from {source}: " + "; ".join(found) + hint
            )

    def write_num_steps(self) -> None:
        """Write the num_steps of a run that goes on to config.json, where it differs."""
        on_first_rank(self.saver.group, self._write_num_steps)

    def _write_num_steps(self) -> None:
        saved = TrainConfig.load(self.config_path)
        if saved.num_steps != self._cfg.num_steps:
            replace(saved, num_steps=self._cfg.num_steps).save(self.config_path)

    def _config_of_checkpoint(self, damaged: ValueError) -> tuple[TrainConfig, Path]:
        """What the newest good checkpoint says of the run; raises `damaged` where none says it."""
        try:
            saved = latest(self.checkpoints)
            return TrainConfig.from_tree(saved.state(rank=0)["config"], saved.path), saved.path
        except (OSError, ValueError, KeyError):
            raise damaged from None

    def state(self, **parts: Stateful) -> dict[str, Any]:
        """JSON-able: what `restore` takes."""
        return {
            **{name: part.state_dict() for name, part in parts.items()},
            "random": random_state(),
            "config": json.loads(self._cfg.to_json()),
        }

    @staticmethod
    def restore(state: dict[str, Any], *, num_ranks: int, loader: Data, **parts: Stateful) -> None:
        """Parts that an older checkpoint does not hold start anew.

        On another number of ranks than saved it, the data begin their epoch again, and so does what
        is a rank's own.
        """
        before = state.get("num_ranks", 1)
        if before != num_ranks:
            for name in ("guard", "skips"):
                if name in state:
                    _load(name, parts[name].load_state_dict, state)
            logger.warning(
                "THE DATA STARTS AGAIN at the beginning of epoch %d: %d ranks saved, %d go on, and "
                "a position in the data is of one number of ranks. Weights, moments, averages and "
                "schedules go on where they were.",
                _load("loader", loader.restart_epoch, state),
                before,
                num_ranks,
            )
            return
        parts = {**parts, "loader": loader}
        loads: dict[str, Callable[[Any], object]] = {n: p.load_state_dict for n, p in parts.items()}
        for name, load in {**loads, "random": set_random_state}.items():
            if name in state:
                _load(name, load, state)

    def close(self) -> None:
        """Wait for the save in flight, raise its error if it had one, and free the directory."""
        try:
            self.saver.close()
        finally:
            self._lock.release()


def _load(name: str, load: Callable[[Any], T], state: dict[str, Any]) -> T:
    """Load a part of a state; ValueError names the part that is damaged or of another run."""
    try:
        return load(state[name])
    except ValueError as error:
        raise ValueError(f"the checkpoint's state: {name}: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's state: {name}: damaged: {error!r}") from error
