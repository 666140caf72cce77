"""Saving: copy to host buffers, write in a thread, commit, and delete surplus checkpoints.

A training step waits for the copy alone. The order of durability is: every file, the manifest,
their directories, the name of the checkpoint, the pointer; older checkpoints are deleted only then.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from m3i_fast.durable_files import remove_directory, sync, write_atomically
from m3i_fast.engine.checkpoint.checkpoints import POINTER, Checkpoint, checkpoints, tensors_of
from m3i_fast.engine.checkpoint.shard_files import Content, write_shards
from m3i_fast.engine.optim.optimizers import Optimizers
from m3i_fast.engine.parallel.ranks import PATIENCE

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run into `directory`, one at a time.

    Where torch.distributed is initialised, all ranks create a Saver and call its methods alike. An
    error of a save in the background is logged when it happens and raised by the next `save`,
    `wait` or `close`; earlier checkpoints are untouched.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        keep_every: int = 0,
        keep_best: bool = False,
        background: bool = False,
    ) -> None:
        """Prepare to save; `background` saves in a thread from host copies.

        keep: number of newest checkpoints to keep. keep_every: also keep those at multiples of so
        many steps. keep_best: also keep the one whose state has the lowest log.score.
        """
        self.directory, self._keep = directory, keep
        self._keep_every, self._keep_best = keep_every, keep_best
        self._host = HostCopy() if background else None
        # A process group of its own: the thread's messages must not mix with the training step's.
        distributed = dist.is_available() and dist.is_initialized()
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if distributed else None
        self.is_first = self.group is None or dist.get_rank(self.group) == 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved_step: int | None = None
        """Step that `save` was last called with, or that the run was resumed at."""

    def save(
        self, *, step: int, model: nn.Module, optimizer: Optimizers, state: dict[str, Any]
    ) -> None:
        """Save, or start a save in the background; a step is saved once."""
        if step == self.saved_step:
            return
        self.wait()
        tensors = tensors_of(model, optimizer)
        if self._host is None:
            self._write(step, Content(tensors, {k: _local(t) for k, t in tensors.items()}, state))
        else:
            content = Content(tensors, self._host.copy(tensors), state)
            self._thread = threading.Thread(
                target=self._write_in_background, args=(step, content), name=f"save-{step}"
            )
            self._thread.start()  # not a daemon: the interpreter waits for it at exit
        self.saved_step = step

    def forget_after(self, checkpoint: Checkpoint) -> None:
        """Delete checkpoints later than this one, which the run continues from."""
        self.wait()
        if self.is_first:
            self._point_to(checkpoint)
            for later in reversed(checkpoints(self.directory)):
                if later.step > checkpoint.step:
                    remove_directory(later.path)
        self.saved_step = checkpoint.step

    @property
    def is_writing(self) -> bool:
        """Return whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in flight; raise its error, if it had one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error, self.saved_step = self._error, None, None
            raise error

    def close(self) -> None:
        """Wait for the save in flight and release the host buffers."""
        self.wait()
        self._host = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def _write_in_background(self, step: int, content: Content) -> None:
        try:
            self._write(step, content)
        except BaseException as error:
            logger.error("step %d: no checkpoint written: %s", step, error)
            self._error = error

    def _write(self, step: int, content: Content) -> None:
        path = self.directory / f"step_{step:08d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if self.is_first:
            self._sweep()
        try:
            write_shards(
                temporary,
                content,
                step=step,
                group=self.group,
                commit=lambda: self._commit(temporary, Checkpoint(path)),
            )
        except BaseException:
            if self.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _sweep(self) -> None:
        """Delete what killed runs left half written or half deleted."""
        for folder in self.directory.glob(".step_*"):
            remove_directory(folder)
        for file in self.directory.glob(f".{POINTER}.tmp-*"):
            with contextlib.suppress(OSError):
                file.unlink()

    def _commit(self, temporary: Path, checkpoint: Checkpoint) -> None:
        path = checkpoint.path
        if path.exists() and checkpoint.damage() is None:
            remove_directory(temporary)
        else:
            if path.exists():  # damaged, and skipped when this run was resumed
                for earlier in self._up_to(checkpoint.step - 1)[-1:]:
                    self._point_to(earlier)
                remove_directory(path)
            os.rename(temporary, path)
            sync(path.parent)
        self._point_to(checkpoint)
        candidates = self._up_to(checkpoint.step)
        best = best_of(candidates) if self._keep_best else None
        for old in candidates[: -self._keep]:
            if old != best and (not self._keep_every or old.step % self._keep_every):
                remove_directory(old.path)

    def _up_to(self, step: int) -> list[Checkpoint]:
        """Return checkpoints up to `step`; later ones were damaged when this run was resumed."""
        return [c for c in checkpoints(self.directory) if c.step <= step]

    def _point_to(self, checkpoint: Checkpoint) -> None:
        write_atomically(self.directory / POINTER, f"{checkpoint.path.name}\n".encode())


def best_of(candidates: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint of the lowest score; None where none has one."""
    best = min(candidates, key=score_of, default=None)
    return None if best is None or score_of(best) == math.inf else best


def score_of(checkpoint: Checkpoint) -> float:
    """Return the score, lower is better; infinity where there is none or it cannot be read."""
    try:
        score = checkpoint.state(rank=0).get("log", {}).get("score")
    except (ValueError, OSError):
        return math.inf
    return math.inf if score is None else float(score)


class HostCopy:
    """Copies of tensors in reused host buffers, pinned for tensors on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy this rank's local shards, valid until the next call; wait for the copies."""
        copies = {}
        for name, tensor in tensors.items():
            shard = _local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
                buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
            copies[name] = buffer.copy_(shard, non_blocking=True)
        self._buffers = copies
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return dict(copies)


def _local(tensor: Tensor) -> Tensor:
    shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return shard.detach()
