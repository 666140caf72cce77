"""One run a directory: a lock that ends with the process, however the process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

logger = logging.getLogger(__name__)

NAME = "run.lock"
_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunLock:
    """Held from `acquire` to `release`, or to the end of the process that holds it.

    The kernel holds the lock of the open file, and its text only says who has it: what a killed
    process left behind locks nothing. The file stays, since a lock on a file that is deleted and
    made again would be two locks.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """FileExistsError says which other holds it. The run's directory must exist."""
        if self._descriptor is not None:
            return
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
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
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(who) + "\n").encode(), 0)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def _holder(text: bytes) -> str:
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']}, since {who['since']},"
    except (ValueError, KeyError, TypeError):
        return "another process"
