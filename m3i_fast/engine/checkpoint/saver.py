"""Saving: copy to host buffers, write in a thread, commit, and delete what is too many.

A step waits for the copy alone. The order in which things become durable is: every file, the
manifest, their directories, the name of the checkpoint, the pointer; only then older ones go.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Mapping
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

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run into `directory`, one at a time.

    Where torch.distributed is initialised all ranks make one and call its methods alike. An error
    of a save in the background is logged when it happens and raised by the next `save`, `wait` or
    `close`; the older checkpoints are as they were.
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
        """keep: newest ones kept. keep_every: those of every so many steps are kept as well, and
        keep_best the one whose state has the lowest log.score.
        """
        self.directory, self._keep = directory, keep
        self._keep_every, self._keep_best = keep_every, keep_best
        self._host = HostCopy() if background else None
        # Of its own, since the thread's messages must not mix with those of the training step.
        distributed = dist.is_available() and dist.is_initialized()
        self.group = dist.new_group(backend="gloo") if distributed else None
        self.is_first = self.group is None or dist.get_rank(self.group) == 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved_step: int | None = None
        """The last step that was given to `save`, or that a run was resumed at."""

    def save(
        self, *, step: int, model: nn.Module, optimizer: Optimizers, state: dict[str, Any]
    ) -> None:
        """Save, or begin to; a step that is saved already is not saved again."""
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
            self._thread.start()  # no daemon: the interpreter waits for it at its exit
        self.saved_step = step

    def forget_after(self, checkpoint: Checkpoint) -> None:
        """Delete later ones and go on from this; nothing may be in flight."""
        self.wait()
        if self.is_first:
            self._point_to(checkpoint)
            for later in reversed(checkpoints(self.directory)):
                if later.step > checkpoint.step:
                    remove_directory(later.path)
        self.saved_step = checkpoint.step

    @property
    def is_writing(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Until nothing is being written; raises the error of what was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error, self.saved_step = self._error, None, None
            raise error

    def close(self) -> None:
        """Wait, and let go of the buffers."""
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
        """What killed runs left half written or half deleted: one run at a time is here."""
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
            if path.exists():  # passed over when this run was resumed
                for earlier in self._up_to(checkpoint.step - 1)[-1:]:
                    self._point_to(earlier)
                remove_directory(path)
            os.rename(temporary, path)
            sync(path.parent)
        self._point_to(checkpoint)
        found = self._up_to(checkpoint.step)
        scored = [c for c in found if self._keep_best and _score(c) < math.inf]
        best = min(scored, key=_score, default=None)
        for old in found[: -self._keep]:
            if old != best and (not self._keep_every or old.step % self._keep_every):
                remove_directory(old.path)

    def _up_to(self, step: int) -> list[Checkpoint]:
        """Later ones do not count: they were passed over as damaged when this run was resumed."""
        return [c for c in checkpoints(self.directory) if c.step <= step]

    def _point_to(self, checkpoint: Checkpoint) -> None:
        write_atomically(self.directory / POINTER, f"{checkpoint.path.name}\n".encode())


def _score(checkpoint: Checkpoint) -> float:
    """The lower the better; infinite where there is none, or none that can be read."""
    try:
        score = checkpoint.state(rank=0).get("log", {}).get("score")
    except (ValueError, OSError):
        return math.inf
    return math.inf if score is None else float(score)


class HostCopy:
    """Copies in host memory, pinned where they come from a GPU; the buffers are made once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each, valid until the next call; returns when all are copied."""
        copies = {}
        for name, tensor in tensors.items():
            part = _local(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            copies[name] = buffer.copy_(part, non_blocking=True)
        self._buffers = copies
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return dict(copies)


def _local(tensor: Tensor) -> Tensor:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach()
