"""A file layer that fails.

It counts the operations of `os` that change files, and ends the process at one or refuses them.

    with FaultyFiles(root) as files:          # counts only
        save()
    files.operations                          # [Operation("mkdir", ".step_00000002.tmp"), ...]

    with FaultyFiles(root, kill_at=7): ...    # SIGKILL of this process before operation 7
    with FaultyFiles(root, kill_at=7, torn=True): ...   # of a write, half is written before
    with FaultyFiles(root, kill_at=7, power_cut=True): ...  # what was not synced is lost as well
    with FaultyFiles(root, fail_at=7): ...    # no space from operation 7 on
    with FaultyFiles(root, fail_at=0, error=errno.EROFS, kinds=NAMES): ...   # a read-only directory

Operations: open for writing, write, fsync, rename and replace, mkdir, unlink, rmdir, on paths under
`root`. They are seen where Python calls `os`: bytes that a library writes by itself are not.
A power cut does the worst that a file system may do: a file that was written and not synced is
emptied, and new and changed names in a directory that was not synced are taken back. `killed_at`
forks a process to be killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir")
TAKES_SPACE = ("open", "write", "mkdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of a file: its kind and its path, relative to the root."""

    kind: str
    path: str


class FaultyFiles(AbstractContextManager["FaultyFiles"]):
    """The calls of `os` that change files, counted and spoilt as the module says."""

    def __init__(
        self,
        root: Path,
        *,
        kill_at: int | None = None,
        torn: bool = False,
        power_cut: bool = False,
        fail_at: int | None = None,
        error: int = errno.ENOSPC,
        kinds: Container[str] = TAKES_SPACE,
    ) -> None:
        self.root = root.resolve()
        self.operations: list[Operation] = []
        self._kill_at, self._torn, self._power_cut = kill_at, torn, power_cut
        self._fail_at, self._error, self._kinds = fail_at, error, kinds
        self._real: dict[str, Callable[..., Any]] = {}
        self._unsynced: dict[tuple[int, int], int] = {}  # inode -> a descriptor of our own
        # Since their directory was synced:
        self._created: list[str] = []
        self._renamed: list[tuple[str, str]] = []

    def __enter__(self) -> FaultyFiles:
        for name in NAMES:
            self._real[name] = getattr(os, name)
            setattr(os, name, self._wrap(name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)
        for descriptor in self._unsynced.values():
            os.close(descriptor)

    def _wrap(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            path = self._path_of(name, arguments, options)
            if path is None:
                return self._real[name](*arguments, **options)
            number = len(self.operations)
            self.operations.append(Operation(name, path))
            if number == self._kill_at:
                if self._torn and name == "write":
                    self._real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.die()
            if self._fail_at is not None and number >= self._fail_at and name in self._kinds:
                raise OSError(self._error, os.strerror(self._error), path)
            result = self._real[name](*arguments, **options)
            if self._power_cut:
                self._remember(name, arguments, result)
            return result

        return operation

    def _path_of(self, name: str, arguments: tuple[Any, ...], options: Any) -> str | None:
        """Relative to the root; None of what is elsewhere or changes nothing."""
        target = arguments[1] if name in ("rename", "replace") else arguments[0]
        if name == "open" and not arguments[1] & WRITING:
            return None
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        elif (folder := options.get("dir_fd")) is not None:
            target = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), target)
        path = Path(os.path.abspath(os.fspath(target)))
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else None

    # ---- A power cut -----------------------------------------------------------------------------

    def _remember(self, name: str, arguments: tuple[Any, ...], result: Any) -> None:
        if name == "open":
            self._unsynced.setdefault(_inode(result), os.dup(result))
            self._created.append(os.path.abspath(arguments[0]))
        elif name == "mkdir":
            self._created.append(os.path.abspath(arguments[0]))
        elif name == "fsync":
            if (descriptor := self._unsynced.pop(_inode(arguments[0]), None)) is not None:
                os.close(descriptor)
            folder = os.readlink(f"/proc/self/fd/{arguments[0]}")
            self._created = [p for p in self._created if os.path.dirname(p) != folder]
            self._renamed = [r for r in self._renamed if os.path.dirname(r[1]) != folder]
        elif name in ("rename", "replace"):
            before, after = (os.path.abspath(path) for path in arguments[:2])
            moved = [_moved(path, before, after) for path in self._created]
            self._created = [path for path in moved if path != after]
            if name == "rename":  # what is replaced may be the old one or the new one: both whole
                self._renamed.append((before, after))

    def die(self) -> None:
        """Kill the process by SIGKILL, after dropping what a power cut would have lost.

        By a child, while all of this process's threads stand still.
        """
        if self._power_cut:
            this = os.getpid()
            child = os.fork()
            if child == 0:
                os.kill(this, signal.SIGSTOP)
                while Path(f"/proc/{this}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                    time.sleep(0.001)
                try:
                    self._lose()
                finally:
                    os.kill(this, signal.SIGKILL)
                    os._exit(0)
            os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGKILL)

    def _lose(self) -> None:
        for descriptor in self._unsynced.values():
            os.ftruncate(descriptor, 0)
        for path in reversed(self._created):
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                self._real["unlink"](path)
        for before, after in reversed(self._renamed):
            if os.path.exists(after):  # else it was in a directory that is lost
                self._real["rename"](after, before)


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _moved(path: str, before: str, after: str) -> str:
    """Return the name that `path` has after a rename."""
    return after + path[len(before) :] if f"{path}/".startswith(f"{before}/") else path


def in_child(function: Callable[[], object]) -> int:
    """Run `function` in a fork of this process: 0, minus the signal that ended it, or 1."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(
    function: Callable[[], object],
    root: Path,
    number: int,
    *,
    torn: bool = False,
    power_cut: bool = False,
) -> bool:
    """Run `function` in a child that is killed at its operation `number`.

    False when it had fewer operations; AssertionError when it ended in another way.
    """

    def run() -> None:
        with FaultyFiles(root, kill_at=number, torn=torn, power_cut=power_cut):
            function()

    code = in_child(run)
    assert code in (0, -signal.SIGKILL), f"operation {number}: ended with {code}"
    return code != 0


def flip_byte(path: Path, position: int | None = None) -> None:
    """Change one byte, the middle one unless said."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 0xFF
    path.write_bytes(content)


def truncate(path: Path, size: int | None = None) -> None:
    """Cut a file, to half unless said."""
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    """Give a file of a checkpoint another content, and the manifest its size and SHA-256."""
    (checkpoint / name).write_bytes(content)
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))
