"""The folder that a data set is packed into: finished files appear in it whole, by their name."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from m3i_fast.durable_files import make_directories, replaced_atomically, write_atomically
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME

STATE = ".packing"  # below it, what a killed pack needs to go on; removed at the end
LEFT = (".*.tmp-*", ".*.writing")


@contextlib.contextmanager
def written(out: Path, name: str) -> Iterator[Path]:
    """Yield a local file to write, which becomes that file of `out`, unless the block raises."""
    with replaced_atomically(out / name) as temporary:
        yield temporary


def write(out: Path, name: str, content: bytes) -> None:
    """Write a finished file of `out`."""
    write_atomically(out / name, content)


def read(out: Path, name: str) -> bytes | None:
    """Read a finished file of `out`; None where there is none."""
    try:
        return (out / name).read_bytes()
    except FileNotFoundError:
        return None


def size(out: Path, name: str) -> int | None:
    """Return the bytes of a finished file of `out`; None where there is none."""
    path = out / name
    return path.stat().st_size if path.is_file() else None


def remove(out: Path, name: str) -> None:
    """Remove a file of `out`, if it is there."""
    (out / name).unlink(missing_ok=True)


def tidy(out: Path) -> None:
    """Remove the state of a pack that is finished, and all where nothing was begun."""
    if (out / MANIFEST_NAME).is_file():
        shutil.rmtree(out / STATE)
    elif not any(
        path.name not in ("lock", "spool", "spool.key") for path in (out / STATE).iterdir()
    ):
        shutil.rmtree(out / STATE)
        if not any(out.iterdir()):
            out.rmdir()


@contextlib.contextmanager
def locked(
    out: Path, state: str = STATE, doing: str = "packed", left: Sequence[str] = LEFT
) -> Iterator[None]:
    """Keep a second process from writing into `out`; ValueError where one does.

    state: folder below `out` with the lock. left: patterns of what writes of a killed process left
    half done, which is removed.
    """
    make_directories(out / state)
    with (out / state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"DIR: {out} is being {doing} by another process") from None
        for folder in (out, out / state):
            for file in [file for pattern in left for file in folder.glob(pattern)]:
                file.unlink(missing_ok=True)
        yield
