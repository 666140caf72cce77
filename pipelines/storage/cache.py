"""A bounded folder of fetched files that the processes of a node share.

    FOLDER/files/NAME           whole files
    FOLDER/users/ID/lock        held by a process as long as it lives
    FOLDER/users/ID/NAME        a hard link to a file in use, or a file that is being written
    FOLDER/size                 bytes of all of these, changed under the lock of FOLDER/lock

A file is written in the folder of its process, synced, and then linked into files/, so what is
there is whole, whenever a process is killed. A file in use has a second link, so that whoever needs
room sees it and takes another one, those used longest ago first. The folder of a process that is
gone is removed by the next one that needs room or begins.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SLACK = 20  # a sweep frees a 20th more than is needed, so that few reads list the folder


class CacheFull(OSError):
    """All files are in use, and there is no room for another one."""


class SharedCache:
    """Files of one folder, of this and other processes; safe to use from several threads.

    folder: made where it is missing, on a file system with hard links. limit_bytes: bound on the
    files of all processes together, as each of them is told.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._files = folder / "files"
        self._thread_lock = threading.Lock()
        self._alive: int | None = None
        self.open()

    def open(self) -> None:
        """Begin to use the folder, as a cache that was just made does; after `close`, again."""
        if self._alive is not None:
            return
        self._files.mkdir(parents=True, exist_ok=True)
        self._own = self.folder / "users" / f"{os.getpid()}-{secrets.token_hex(4)}"
        with self._locked():  # so that nobody takes the folder for that of a dead process
            self._own.mkdir(parents=True)
            self._alive = os.open(self._own / "lock", os.O_CREAT | os.O_RDWR, 0o666)
            fcntl.flock(self._alive, fcntl.LOCK_EX)
            self._sweep(0)

    def take(self, name: str, num_bytes: int) -> Path | None:
        """Return a file that is kept until `release`, or None where it has to be fetched."""
        own = self._own / name
        with self._locked():
            if own.exists():
                return own
            try:
                os.link(self._files / name, own)
            except FileNotFoundError:
                return None
            if own.stat().st_size != num_bytes:  # of a disk that lost power
                self._remove(self._files / name)
                self._remove(own)
                return None
            os.utime(own)
        return own

    def write(self, name: str, num_bytes: int, pieces: Iterable[memoryview | bytes]) -> Path:
        """Fetch a file into the cache, and return it as `take` does.

        pieces: its content, `num_bytes` of it, written as it comes. Raises CacheFull where there is
        no room, before the first piece is asked for, or where the disk is full, after which the
        cache is bounded by what it holds; and whatever `pieces` raises. Nothing is left then.
        """
        part, own = self._own / f"{name}.part", self._own / name
        with self._locked():
            if self._size() + num_bytes > self.limit_bytes:
                self._sweep(num_bytes)
            with part.open("xb") as file:  # its size is that of the whole file at once, for sweeps
                file.truncate(num_bytes)
            self._set_size(self._size() + num_bytes)
        try:
            with part.open("r+b") as file:
                written = sum(file.write(piece) for piece in pieces)
                if written != num_bytes:
                    raise ValueError(f"{name}: expected {num_bytes} bytes, got {written}")
                file.flush()
                os.fsync(file.fileno())
            with self._locked():
                os.replace(part, own)
                try:
                    os.link(own, self._files / name)
                except FileExistsError:  # another process was as fast: its file is as good
                    self._remove(own)
                    os.link(self._files / name, own)
        except BaseException as error:
            with self._locked():
                self._remove(part)
                if isinstance(error, OSError) and error.errno in _DISK_FULL:
                    raise self._kept_smaller(error) from error
            raise
        return own

    def _kept_smaller(self, error: OSError) -> CacheFull:
        """Bound the cache by what it holds, since its disk has room for no more."""
        self.limit_bytes = min(self.limit_bytes, self._recount())
        logger.warning(
            "%s: %s: the cache is kept to the %d bytes that it has; make room on its disk, or name "
            "another by --data.cache-dir",
            self.folder,
            error.strerror,
            self.limit_bytes,
        )
        return CacheFull(f"{self.folder}: {error.strerror}")

    def release(self, name: str) -> None:
        """Say that a file is no longer in use here."""
        with self._locked():
            self._remove(self._own / name)

    def drop(self, name: str) -> None:
        """Remove a file that was taken and is damaged; others that use it keep it."""
        with self._locked():
            own, shared = self._own / name, self._files / name
            if shared.exists() and shared.samefile(own):  # not one that was fetched anew meanwhile
                self._remove(shared)
            self._remove(own)

    def close(self) -> None:
        """Release all files; the cache keeps them for others."""
        if self._alive is None:
            return
        with self._locked():
            shutil.rmtree(self._own, ignore_errors=True)
            self._recount()
        os.close(self._alive)
        self._alive = None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder, against other threads and processes."""
        with self._thread_lock:
            descriptor = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _size(self) -> int:
        try:
            return int((self.folder / "size").read_text())
        except (FileNotFoundError, ValueError):
            return self._recount()

    def _set_size(self, size: int) -> None:
        (self.folder / "size").write_text(str(size))

    def _remove(self, path: Path) -> None:
        """Remove a name, and count its bytes as free where it was the last one."""
        try:
            found = path.stat()
            path.unlink()
        except FileNotFoundError:
            return
        if found.st_nlink == 1:
            self._set_size(max(self._size() - found.st_size, 0))

    def _recount(self) -> int:
        """Count the bytes of all files anew: a process that was killed has left its own counted."""
        size = sum(found.st_size for _, found in _scan(self._files))
        for user in (self.folder / "users").iterdir():
            links = (found for path, found in _scan(user) if path.name != "lock")
            size += sum(found.st_size for found in links if found.st_nlink == 1)
        self._set_size(size)
        return size

    def _sweep(self, num_bytes: int) -> None:
        """Make room for a file; raise CacheFull where too much is in use."""
        for user in (self.folder / "users").iterdir():
            if user != self._own and is_left_over(user):
                shutil.rmtree(user, ignore_errors=True)
        size = self._recount()
        if size + num_bytes <= self.limit_bytes:
            return
        aim = max(self.limit_bytes - num_bytes - self.limit_bytes // _SLACK, 0)
        free = [(path, found) for path, found in _scan(self._files) if found.st_nlink == 1]
        for path, found in sorted(free, key=lambda entry: entry[1].st_mtime_ns):
            if size <= aim:
                break
            path.unlink()
            size -= found.st_size
        self._set_size(size)
        if size + num_bytes > self.limit_bytes and num_bytes:
            users = sum(1 for _ in (self.folder / "users").iterdir())
            raise CacheFull(
                f"{self.folder}: no room for {num_bytes} bytes: {size} of {self.limit_bytes} are "
                f"in use by {users} processes"
            )


def _scan(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files of a folder; one that is removed meanwhile is left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                yield Path(entry.path), entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue


def is_left_over(folder: Path) -> bool:
    """Return whether the process of a folder is gone: nobody holds its lock."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
