"""Where a data set is packed to: finished files appear there whole, by their name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from m3i_fast.durable_files import make_directories, replaced_atomically, write_atomically
from m3i_fast.pipelines.dataset.manifest import (
    MANIFEST_NAME,
    Manifest,
    is_dataset,
    read_manifest,
)
from m3i_fast.pipelines.storage.requests import Stop

STATE = ".packing"  # below it, what a killed pack needs to go on; removed at the end
LEFT = (".*.tmp-*", ".*.writing")
LOCK, SPOOLED = "lock", ("spool", "spool.key")


@dataclass(slots=True)
class NewFile:
    """A local file that is being written, and the digest that its writer notes."""

    path: Path
    sha256: str = ""


class Output(Protocol):
    """A folder or a bucket that is packed into; each process has a copy of this object."""

    @property
    def place(self) -> str:
        """Path or URL, as errors name it."""

    @property
    def spool(self) -> Path:
        """A local folder, there while it is `locked`, for pictures that are copied first."""

    @property
    def is_shared(self) -> bool:
        """Whether another machine may go on, on which files of the source have other times."""

    def locked(self) -> AbstractContextManager[None]:
        """Keep a second process from packing here, and remove what a killed one left half done."""

    def check_free(self, source: Path) -> None:
        """Raise ValueError where what lies here is neither a data set nor a pack begun."""

    def manifest(self) -> Manifest | None:
        """Read the manifest of a data set that is whole; None where there is none."""

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes of each finished file by name, state included."""

    def written(self, name: str) -> AbstractContextManager[NewFile]:
        """Yield a local file to write, which becomes that file, unless the block raises."""

    def described(self) -> AbstractContextManager[Path]:
        """Yield a local folder for tables and manifest, which become files, the manifest last."""

    def write(self, name: str, content: bytes) -> None:
        """Write a finished file."""

    def create(self, name: str, content: bytes) -> None:
        """Write a finished file that was not there; ValueError where another process was first."""

    def read(self, name: str, stop: Stop | None = None) -> bytes | None:
        """Read a finished file; None where there is none. A stop that is set gives it up."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def tidy(self, *, is_whole: bool) -> None:
        """Remove the state of a pack that is finished, and all where nothing was begun."""


@dataclass(frozen=True, slots=True)
class FolderOutput:
    """A folder that a data set is packed into."""

    path: Path

    @property
    def place(self) -> str:
        """Return the folder's path."""
        return str(self.path)

    @property
    def spool(self) -> Path:
        """Return the folder of the state."""
        return self.path / STATE

    @property
    def is_shared(self) -> bool:
        """Return False: a file of the source with another time is another file."""
        return False

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the folder."""
        return locked(self.path)

    def check_free(self, source: Path) -> None:
        """Refuse other files, and a folder in the source, of which its shards would be a part."""
        out = self.path
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"DIR: expected a directory outside of SOURCE ({source}), got {out}")
        if out.exists() and not out.is_dir():
            raise ValueError(f"DIR: expected a directory, got a file: {out}")
        if out.is_dir() and any(out.iterdir()) and not is_dataset(out):
            if not (out / STATE).is_dir():
                raise ValueError(
                    f"DIR: expected a new or empty directory, got other files in {out}"
                )

    def manifest(self) -> Manifest | None:
        """Read the manifest, of which `is_dataset` tells whether it is one."""
        return read_manifest(self.path) if is_dataset(self.path) else None

    def sizes(self) -> dict[str, int]:
        """List the folder and its state."""
        found: dict[str, int] = {}
        for prefix, folder in (("", self.path), (f"{STATE}/", self.path / STATE)):
            with os.scandir(folder) as entries:
                found.update(
                    (prefix + entry.name, entry.stat().st_size)
                    for entry in entries
                    if entry.is_file()
                )
        return found

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[NewFile]:
        """Yield a file beside its place, which is then renamed."""
        with replaced_atomically(self.path / name) as temporary:
            yield NewFile(temporary)

    @contextlib.contextmanager
    def described(self) -> Iterator[Path]:
        """Yield the folder itself, in which each file appears whole."""
        yield self.path

    def write(self, name: str, content: bytes) -> None:
        """Write beside its place, and rename."""
        write_atomically(self.path / name, content)

    def create(self, name: str, content: bytes) -> None:
        """Write as `write`: the lock keeps others away."""
        self.write(name, content)

    def read(self, name: str, stop: Stop | None = None) -> bytes | None:
        """Read a file of the folder."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file of the folder."""
        (self.path / name).unlink(missing_ok=True)

    def tidy(self, *, is_whole: bool) -> None:
        """Remove the state, or the folder that is empty but for it."""
        state = self.path / STATE
        if (self.path / MANIFEST_NAME).is_file():
            shutil.rmtree(state)
        elif not any(file.name not in (LOCK, *SPOOLED) for file in state.iterdir()):
            shutil.rmtree(state)
            if not any(self.path.iterdir()):
                self.path.rmdir()


@contextlib.contextmanager
def alone(folder: Path, place: str, doing: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made; ValueError where another process holds it.

    place, doing: what the error says is being packed, or indexed.
    """
    make_directories(folder)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"DIR: {place} is being {doing} by another process") from None
        yield


@contextlib.contextmanager
def locked(
    out: Path, state: str = STATE, doing: str = "packed", left: Sequence[str] = LEFT
) -> Iterator[None]:
    """Keep a second process from writing into `out`; ValueError where one does.

    state: folder below `out` with the lock. left: patterns of what writes of a killed process left
    half done, which is removed.
    """
    with alone(out / state, str(out), doing):
        for folder in (out, out / state):
            for file in [file for pattern in left for file in folder.glob(pattern)]:
                file.unlink(missing_ok=True)
        yield
