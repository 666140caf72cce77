"""Files that are whole or absent: written beside, synced and renamed.

All that checkpoints write goes through the functions of `os` here, so that a test can count the
writes of a save and end the process at any of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_UNPACKED, MOST_RATIO = 1 << 30, 100  # bytes that any file may unpack to, or times its own
PIECE = 16 << 20  # bytes of a write: hashing and writing let go of the GIL in between


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file holds."""

    size: int
    sha256: str


def expect_local(path: Path, flag: str) -> None:
    """Raise ValueError for a URL, which a Path takes for folders of this machine."""
    if re.match(r"[a-z][a-z0-9]+:/", str(path)):
        raise ValueError(
            f"{flag}: expected a path of this machine or of a file system mounted here, got the "
            f"URL {path}: copy it, or mount the bucket"
        )


def expect_folder(path: Path, flag: str) -> None:
    """Raise ValueError unless `path` is a folder of this machine that can be written, or made."""
    expect_local(path, flag)
    whole = path.absolute()
    there = next(each for each in (whole, *whole.parents) if os.path.lexists(each))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(
            f"{flag}: expected a folder that can be written, got {path} ({there}: "
            f"{error.strerror}): name another"
        ) from None


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path` to write, then sync it and rename it to `path`.

    On any error, a full disk included, the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a process of the same id that was killed
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def created_whole(path: Path) -> Iterator[Path]:
    """Yield a new directory beside `path` to write in, then sync it and rename it to `path`.

    Directories above it are made where they are missing. On any error nothing of it stays. Raises
    FileExistsError where `path` is there.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: name another folder")
    make_directories(path.absolute().parent)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    if os.path.lexists(temporary):  # of a process of the same id that was killed
        _delete(temporary)
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        os.rename(temporary, path)
    except BaseException:
        _delete(temporary)
        raise
    sync(path.absolute().parent)


def make_directories(path: Path) -> None:
    """Make a directory and those above it that are missing, so that a power cut leaves them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; on any error, a full disk included, the old file stays."""
    with replaced_atomically(path) as temporary:
        write_durably(temporary, [content])


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> Digest:
    """Write a new file piece by piece and sync it; hashed on the way, with no copy in memory."""
    hashed, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                hashed.update(piece)
                size += len(piece)
                while len(piece):
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    except OSError as error:  # which names no file, of a descriptor
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    return Digest(size, hashed.hexdigest())


def kind_of(mode: int) -> str:
    """Name what a mode of `os.lstat` stands for."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a fifo",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def what_is_at(path: Path) -> str:
    """Say that nothing is at a path, or that a symbolic link is whose target is missing."""
    if path.is_symlink() and not path.exists():
        return f"a symbolic link to {os.readlink(path)}, which is not there, at {path}"
    return f"none at {path}"


def read_file(path: Path) -> bytes:
    """Read a file, or what a symbolic link to one names; ValueError for what may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, got {kind_of(mode)}")
    return Path(path).read_bytes()


class UnpacksToTooMuch(ValueError):
    """A compressed file holds more bytes than it may."""


def expect_unpacked(
    path: Path,
    num_bytes: int,
    most_gib: float | None,
    fix: str = "type a larger --max-unpacked-gib",
) -> None:
    """Raise UnpacksToTooMuch if the bytes that were found in a compressed file are too many.

    most_gib: as --max-unpacked-gib has it; None: 1 GiB, or 100 times the file if that is more.
    """
    most = max(MOST_UNPACKED, MOST_RATIO * path.stat().st_size)
    if most_gib is not None:
        most = int(most_gib * 2**30)
    if num_bytes > most:
        raise UnpacksToTooMuch(
            f"{path}: unpacks to {num_bytes / 2**30:.2f} GiB or more, expected at most "
            f"{most / 2**30:.2f}: if the file is right, {fix}"
        )


def digest(path: Path) -> Digest:
    """Read a file and hash it."""
    hashed, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            hashed.update(piece)
            size += len(piece)
    return Digest(size, hashed.hexdigest())


def remove_directory(path: Path) -> None:
    """Rename `path` to a hidden name, then delete it: half deleted it has no name that counts.

    Of a symbolic link, or a file in its place, the name alone goes. An error is a warning: what is
    left over is hidden.
    """
    hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.deleted")
    try:
        if hidden != path:
            if os.path.lexists(hidden):
                _delete(hidden)
            os.rename(path, hidden)
            sync(path.parent)
        _delete(hidden)
    except OSError as error:
        logger.warning("could not delete %s: %s", path, error)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
