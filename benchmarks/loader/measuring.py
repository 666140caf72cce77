"""What is read of a loader while it is timed, and the check that all of them do the same work."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.pipelines.batch import Batch

TOLERANCE, DEVIATIONS = 0.01, 4.0  # of means in units of 255; standard errors
POLL_S, IDLE_LIMIT_S = 0.1, 120.0
_TICKS = os.sysconf("SC_CLK_TCK")

NOT_COUNTED: set[str] = set()
"""Ids of processes below this one that stand for others: servers that loaders read from."""


class Endless:
    """A loader as `measure_windows` repeats it, with what the host spends on it."""

    def __init__(self, batches: Iterator[Any], *, num_images: int, num_ahead: int) -> None:
        self.num_images, self._num_ahead = num_images, num_ahead
        self._batches = batches
        self._spent = spent()

    def use_up(self) -> None:
        """Wait until no loader fills its queues any more, then empty the queue of this one."""
        wait_until_idle()
        for _ in range(self._num_ahead):
            next(self._batches)

    def step(self) -> None:
        next(self._batches)

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def read(self) -> dict[str, float]:
        """Return what was spent since the last read: cpu_s seconds, read_bytes bytes."""
        before, self._spent = self._spent, spent()
        return {name: self._spent[name] - before[name] for name in before}


def spent() -> dict[str, float]:
    """Return what this process and all processes below it have spent until now.

    cpu_s: user and system seconds. read_bytes: bytes that their system calls have read, of files
    in the page cache as of disks, pipes and sockets; pages of mapped files are not counted.
    """
    processes = list(_with_children(str(os.getpid())))
    return {
        "cpu_s": sum(map(_process_s, processes)),
        "read_bytes": float(sum(map(_process_bytes, processes))),
    }


def wait_until_idle() -> None:
    """Wait until this process and those below it neither use nor wait for a core.

    A loader fills its queues after its turn, which would be timed with the next one's. Raises
    RuntimeError where they are still at work after IDLE_LIMIT_S.
    """
    begun = time.monotonic()
    num_idle = 0
    while num_idle < 2:
        before = spent()["cpu_s"]
        time.sleep(POLL_S)
        is_idle = spent()["cpu_s"] - before <= 0.1 * POLL_S + 1 / _TICKS and not _any_runnable()
        num_idle = num_idle + 1 if is_idle else 0
        if time.monotonic() - begun > IDLE_LIMIT_S:
            raise RuntimeError(
                f"expected loaders to be idle {IDLE_LIMIT_S} s after their turn, when their queues "
                "are full, got one at work; leave it out by --peers"
            )


def _any_runnable() -> bool:
    """Return whether a thread other than this one runs, or waits for a core that others have."""
    own = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/stat"
    for pid in _with_children(str(os.getpid())):
        for file in Path(f"/proc/{pid}/task").glob("*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # ended
                if str(file) != own and file.read_text().rpartition(")")[2].split()[0] == "R":
                    return True
    return False


def _with_children(pid: str) -> Iterator[str]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended
            for child in task.read_text().split():
                if child not in NOT_COUNTED:
                    yield from _with_children(child)


def _process_s(pid: str) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):  # ended
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime, stime: proc(5), after the name


def _process_bytes(pid: str) -> int:
    try:
        first = Path(f"/proc/{pid}/io").read_text().partition("\n")[0]
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or becoming a zombie
        return 0
    return int(first.removeprefix("rchar: "))


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Means over the first views of some images, and the standard errors of these means."""

    shapes: list[list[int]]
    mean: float
    std: float
    mean_error: float
    std_error: float
    bytes_per_image: float = 0.0
    """Of all tensors of a batch, as the host holds them."""


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors that every loader makes: those of a `Batch` without its position."""
    if not isinstance(batch, Batch):
        return list(batch)
    return [
        *batch.global_views,
        *batch.local_views,
        *(batch.boxes, batch.image_size, batch.token_ids, batch.num_tokens),
        *(batch.label, batch.sample_id, batch.group_id),
    ]


def look(batches: Iterator[Any], num_images: int) -> Statistics:
    """Return the statistics of as many batches as hold that many images."""
    views: list[Tensor] = []
    tensors: list[Tensor] = []
    while sum(len(view) for view in views) < num_images:
        tensors = tensors_of(next(batches))
        views.append(tensors[0].cpu().clone())
    of_images = torch.cat(views).flatten(1).float() / 255  # [N, 3 S S]
    mean, std = of_images.mean(1), of_images.std(1)
    count = len(of_images) ** 0.5
    return Statistics(
        shapes=[list(tensor.shape) for tensor in tensors],
        mean=float(mean.mean()),
        std=float(std.mean()),
        mean_error=float(mean.std()) / count,
        std_error=float(std.std()) / count,
        bytes_per_image=sum(t.numel() * t.element_size() for t in tensors) / len(tensors[0]),
    )


def expect_same(ours: Statistics, theirs: Statistics, name: str) -> None:
    """Raise RuntimeError where the other loader's views differ in their statistics."""
    if ours.shapes != theirs.shapes:
        raise RuntimeError(f"{name}: expected tensors of {ours.shapes}, got {theirs.shapes}")
    for measure in ("mean", "std"):
        a, b = getattr(ours, measure), getattr(theirs, measure)
        chance = (
            getattr(ours, f"{measure}_error") ** 2 + getattr(theirs, f"{measure}_error") ** 2
        ) ** 0.5
        if not abs(a - b) <= TOLERANCE + DEVIATIONS * chance:
            raise RuntimeError(
                f"{name}: expected views of {measure} {a:.3f} as ours, within "
                f"{TOLERANCE + DEVIATIONS * chance:.3f}, got {b:.3f}"
            )
