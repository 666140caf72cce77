"""A run's directory: its JSON files, run.lock and checkpoints/, locked by one process."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from m3i_fast.config import LoaderConfig, TrainConfig, differences
from m3i_fast.config.run_encoder import expect_run
from m3i_fast.durable_files import make_directories
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint, checkpoints, latest, on_first_rank
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.run.data_record import DATA_FILE, DataRecord
from m3i_fast.engine.run.extension import log_new_num_steps
from m3i_fast.engine.run.free_fields import log_free_fields, may_differ, with_free_fields
from m3i_fast.engine.run.layout import (
    expect_samples_a_step,
    layout_of,
    layout_with,
    log_new_layout,
)
from m3i_fast.engine.run.lock import RunLock
from m3i_fast.engine.run.random_state import random_state, set_random_state
from m3i_fast.observe.environment import environment
from m3i_fast.pipelines.any_shape.batch import AnyBatch

logger = logging.getLogger(__name__)

T = TypeVar("T")
_ENDED_EARLY = (
    "holds a run that ended before its first checkpoint: add --auto-resume to begin it again, or "
    "name another --out"
)
RESUMES_FILE = "resumes.jsonl"
OF_ONE_RANK = ("means", "random")
"""Parts of a state that differ from rank to rank."""
Resume = bool | Literal["auto"]
"""Whether to continue the run in the directory; auto: continue it if there is one, else begin."""


class Stateful(Protocol):
    """An object whose state a checkpoint saves and restores; the state is JSON-able."""

    def state_dict(self) -> Any:
        """Return the state."""

    def load_state_dict(self, state: Any) -> object:
        """Restore the state that `state_dict` returned."""


class Data(Stateful, Protocol):
    """Where a trainer's batches come from: what `open_loader` opens, or a stand-in for it."""

    def __iter__(self) -> Iterator[AnyBatch]: ...

    def __next__(self) -> AnyBatch: ...

    @property
    def samples(self) -> int:
        """Number of samples that all ranks have taken, the position of the run's next one."""

    def close(self) -> None:
        """Stop the threads."""


class Run:
    """The directory of a run, locked by one process from `begin` or `resume` to `close`.

    Of several ranks the first holds the lock and writes.
    """

    def __init__(
        self,
        path: Path,
        cfg: TrainConfig,
        *,
        new_num_steps: bool = False,
        new_batch_size: bool = False,
    ) -> None:
        """new_num_steps: whether num_steps may differ from that of the run that is resumed.

        new_batch_size: whether as many ranks may take more or fewer samples a step.
        """
        self.path, self._cfg, self._lock = path, cfg, RunLock(path)
        self._new_num_steps, self._new_batch_size = new_num_steps, new_batch_size
        self._again = False  # the directory holds a run that ended before its first checkpoint
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
        """Return the path of the run's config.json."""
        return self.path / "config.json"

    def expect_new(self) -> None:
        """Raise FileExistsError when the directory holds a run that is not to begin again."""
        if self.config_path.exists() and not self._again:
            if not checkpoints(self.checkpoints):
                raise FileExistsError(f"{self.path} {_ENDED_EARLY}")
            raise FileExistsError(
                f"{self.path} holds a run already: add --resume to continue it, or name another "
                "--out"
            )

    def expect_in_place(self) -> None:
        """Raise OSError on the first rank when the directory was deleted, moved or replaced."""
        if self.saver.is_first and (not self.config_path.exists() or self._lock.is_anothers()):
            raise OSError(
                f"{self.path}: the run's directory was deleted, moved or replaced while it trained"
            )

    def find_checkpoint(self, resume: Resume, num_ranks: int = 1) -> Checkpoint | None:
        """Return the checkpoint to continue from; None where the run is to `begin`.

        Raises FileExistsError for a run in the directory without `resume`, and FileNotFoundError
        for no run with it. With auto it raises neither, but all other errors of `resume`.
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

    def _saved_config(self) -> TrainConfig:
        config = self._go_on()
        if not checkpoints(self.checkpoints):
            raise FileNotFoundError(f"{self.path} {_ENDED_EARLY}")
        return config

    def begin(self, data: DataRecord | None = None, attention: str | None = None) -> None:
        """Create the directory of a new run and lock it.

        data: what is kept of the data; None where they come of no data set. attention: kernel of
        attention, for env.json.
        """
        on_first_rank(self.saver.group, lambda: self._begin(data, attention))

    def resume(self, num_ranks: int = 1) -> Checkpoint:
        """Return the newest good checkpoint of the run, to continue on so many ranks.

        On another number of ranks a step may take more or fewer samples, and on as many with
        new_batch_size; what that changes is logged. Raises FileNotFoundError where there is no run
        or checkpoint, FileExistsError where another process trains it, and ValueError where the
        config differs, or the samples a step without either.
        """
        config = on_first_rank(self.saver.group, self._saved_config)
        saved = latest(self.checkpoints, self.saver.group)
        before, now = layout_of(saved.state(), self._cfg), layout_with(self._cfg, num_ranks)
        if before.num_ranks == num_ranks and not self._new_batch_size:
            expect_samples_a_step(before, now)
        on_first_rank(
            self.saver.group,
            lambda: log_new_layout(before, now, steps_taken=saved.step),
        )
        on_first_rank(self.saver.group, lambda: log_free_fields(config, self._cfg))
        if config.num_steps != self._cfg.num_steps:
            on_first_rank(
                self.saver.group,
                lambda: log_new_num_steps(
                    self._cfg, before=config.num_steps, steps_taken=saved.step
                ),
            )
        self.saver.saved_step = saved.step
        return saved

    def roll_back(self, step: int) -> Checkpoint | None:
        """Return the newest good checkpoint of at most so many steps and delete later ones.

        All ranks call this. None where there is no such checkpoint. A resume would begin at the
        returned one.
        """
        self.saver.wait()
        try:
            saved = latest(self.checkpoints, self.saver.group, up_to=step)
        except (FileNotFoundError, ValueError):
            return None
        self.saver.forget_after(saved)
        return saved

    def _begin(self, data: DataRecord | None, attention: str | None) -> None:
        make_directories(self.path)
        self._lock.acquire()
        self.expect_new()
        environment(attention).save(self.path / "env.json")
        if data is not None:
            data.save(self.path)
        self._cfg.save(self.config_path)

    def _go_on(self) -> TrainConfig:
        """Take the directory of a run with this config, and return the one that it had."""
        expect_run(self.path, "--resume")
        self._lock.acquire()
        # How a run is spread over ranks is free; the samples a step are seen to in `resume`, other
        # data by the loader.
        damaged: ValueError | None = None
        try:
            saved, source = TrainConfig.load(self.config_path), self.config_path
        except ValueError as error:
            damaged = error
            saved, source = self._config_of_checkpoint(error)
        compared = with_free_fields(saved, self._cfg)
        compared = replace(
            compared,
            data=_with_batches_of(compared.data, self._cfg.data),
            parallel=self._cfg.parallel,
        )
        self._expect_same(compared, source)
        if damaged is not None:
            logger.warning("%s: written anew, as %s has it", damaged, source)
            saved.save(self.config_path)
        return saved

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
        if asked.checkpoint_every != saved.checkpoint_every:
            hint += (
                f" (--checkpoint-every {saved.checkpoint_every} goes on: with --guard.spikes "
                "rollback, checkpoints decide where the run goes back to)"
            )
        if found := differences(saved, asked):
            raise ValueError(
                f"--resume: the config differs from {source}: " + "; ".join(found) + hint
            )

    def write_changes(self, data: DataRecord | None = None) -> None:
        """Write the config of a resume to config.json, and its changes to resumes.jsonl.

        data: written as `begin` does where an older version began the run without.
        """
        on_first_rank(self.saver.group, lambda: self._write_changes(data))

    def _write_changes(self, data: DataRecord | None) -> None:
        if data is not None and not (self.path / DATA_FILE).exists():
            data.save(self.path)
        saved = TrainConfig.load(self.config_path)
        if changed := differences(saved, self._cfg):
            row = {
                "step": self.saver.saved_step,
                "changed": changed,
                "may_differ": may_differ(saved, self._cfg),
            }
            with (self.path / RESUMES_FILE).open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._cfg.save(self.config_path)

    def _config_of_checkpoint(self, damaged: ValueError) -> tuple[TrainConfig, Path]:
        """Return the config in the newest good checkpoint, and its path; else raise `damaged`."""
        try:
            saved = latest(self.checkpoints)
            return TrainConfig.from_tree(saved.state(rank=0)["config"], saved.path), saved.path
        except (OSError, ValueError, KeyError):
            raise damaged from None

    def state(self, **stateful: Stateful) -> dict[str, Any]:
        """Return the JSON-able state of the parts, the random generators and the config."""
        return {
            **{name: part.state_dict() for name, part in stateful.items()},
            "random": random_state(),
            "config": json.loads(self._cfg.to_json()),
        }

    @staticmethod
    def restore(
        state: dict[str, Any], *, num_ranks: int, loader: Data, **stateful: Stateful
    ) -> None:
        """Restore the state that `state` returned; parts that an older checkpoint lacks start anew.

        The data go on at the next sample of the run, on any number of ranks. On another number than
        it was saved with, what belongs to a single rank starts anew: the means of metrics since the
        last row of the log, and the generators of Python, NumPy and torch, from which nothing of
        ours draws.
        """
        loads: dict[str, Callable[[Any], object]] = {"loader": loader.load_state_dict}
        loads |= {name: part.load_state_dict for name, part in stateful.items()}
        loads["random"] = set_random_state
        if (before := state.get("num_ranks", 1)) != num_ranks:
            for name in OF_ONE_RANK:
                loads.pop(name, None)
            logger.info(
                "%d rank(s) go on with what %d saved: the means of metrics since the last logged "
                "step and the random generators of libraries, which each rank has its own, start "
                "anew",
                num_ranks,
                before,
            )
        for name, load in loads.items():
            if name in state:
                _load(name, load, state)

    def close(self) -> None:
        """Wait for the save in flight, raise its error if it had one, and release the directory."""
        try:
            self.saver.close()
        finally:
            self._lock.release()


def _load(name: str, load: Callable[[Any], T], state: dict[str, Any]) -> T:
    """Load a part of a state; raise ValueError naming a damaged part or one of another run."""
    try:
        return load(state[name])
    except ValueError as error:
        raise ValueError(f"the checkpoint's state: {name}: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the checkpoint's state: {name}: damaged: {error!r}") from error


def _with_batches_of(data: LoaderConfig, other: LoaderConfig) -> LoaderConfig:
    """Return a loader's config with the samples, or the tokens, that another's batch has."""
    if data.any_shape and other.any_shape:
        data = replace(data, max_tokens_per_batch=other.max_tokens_per_batch)
    return replace(data, batch_size=other.batch_size)
