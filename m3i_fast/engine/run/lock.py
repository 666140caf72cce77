"""The lock of a run's directory, which ends with its process, however the process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

from m3i_fast.durable_files import kind_of
from m3i_fast.json_files import parse_json

logger = logging.getLogger(__name__)

NAME = "run.lock"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # does not block on a fifo
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # a link, a directory, a socket
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunLock:
    """A lock that is held from `acquire` to `release`, or to the end of the process.

    The kernel holds the lock on the open file, whose text only names the holder: the file of a
    killed process locks nothing. The file is never deleted, since locks on a deleted and a new file
    of one name would be two locks.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Lock the run's directory, which must exist; FileExistsError names the holder."""
        if self._descriptor is not None:
            return
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise FileExistsError(
                f"{self._path.parent}: {holder} is training in it: wait for its end, stop it, or "
                "name another --out"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("%s: this file system has no locks (%s)", self._path.parent, error)
            return
        self._descriptor = descriptor
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
        text = (json.dumps(who) + "\n").encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))

    def _open(self) -> int:
        """Open run.lock if it is a plain file with one name, since its text is replaced."""
        try:
            descriptor = os.open(self._path, _FLAGS, 0o666)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise self._refusal(kind_of(os.lstat(self._path).st_mode)) from None
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return descriptor
        os.close(descriptor)
        names = f" with {status.st_nlink} names" if stat.S_ISREG(status.st_mode) else ""
        raise self._refusal(f"{kind_of(status.st_mode)}{names}")

    def _refusal(self, got: str) -> FileExistsError:
        return FileExistsError(
            f"{self._path}: expected a file of this run alone, got {got}: remove it"
        )

    def is_anothers(self) -> bool:
        """Return whether the lock file of another run is now in the place of this one's."""
        if self._descriptor is None or not self._path.exists():
            return False
        return not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with suppress(AttributeError, TypeError):  # where Python ends, `os` may be gone already
            self.release()


def _holder(text: bytes) -> str:
    try:
        who = parse_json(text, {"pid": int, "host": str, "since": str}, NAME)
    except ValueError:
        return "another process"
    return f"process {who['pid']} on {who['host']}, since {who['since']},"
