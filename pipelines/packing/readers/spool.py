"""Pictures that their source cannot hand out in any order, copied one after the other to a file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from m3i_fast.durable_files import sync, write_atomically
from m3i_fast.pipelines.packing.items import (
    Place,
    Refused,
    SourceOptions,
    Stamp,
    check_num_bytes,
)

NAME, KEY_NAME = "spool", "spool.key"


class Spool:
    """A file that pictures are appended to, and read from at their places.

    A row of a Parquet file or of a compressed tar is reached by reading all before it, and packing
    reads in a shuffled order: one copy costs less than reading the source again for each shard.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        """Begin a spool, or keep the one of that key.

        folder: None: places are told and nothing is kept, where nothing will be read. key: of
        all that the spool's content depends on.
        """
        self.size, self._key, self._folder = 0, key, folder
        self._file: BinaryIO | None = None
        if folder is not None and _key_of(folder) != key:
            (folder / KEY_NAME).unlink(missing_ok=True)
            self._temporary = folder / f".{NAME}.tmp-{os.getpid()}"
            self._file = self._temporary.open("wb")

    def append(self, content: bytes) -> Place:
        """Append a picture and return its place; raises Refused where it is too large."""
        check_num_bytes(len(content))
        start = self.size
        if self._file is not None:
            self._write(content)
        self.size += len(content)
        return (NAME, start, len(content))

    def _write(self, content: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(content)
        except OSError as error:
            said = f"{error.strerror}, after {self.size:,} bytes of pictures that are copied first"
            raise OSError(error.errno, said, str(self._temporary)) from None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._file is None or self._folder is None:
            return
        try:
            self._file.close()  # which writes as well, and may fail
            if kind is None:
                sync(self._temporary)  # a key without its pictures would refuse all of them
                os.replace(self._temporary, self._folder / NAME)
                sync(self._folder)
                write_atomically(self._folder / KEY_NAME, self._key.encode())
        finally:
            self._temporary.unlink(missing_ok=True)


def _key_of(folder: Path) -> str | None:
    """Return the key of the spool in a folder; None: there is no whole one."""
    try:
        return (folder / KEY_NAME).read_text()
    except FileNotFoundError:
        return None


def open_spool(options: SourceOptions, stamps: Mapping[str, Stamp]) -> Spool:
    """Open the spool of a source; stamps: of the files whose pictures go into it."""
    content = [sorted(asdict(options).items()), sorted(stamps.items())]
    key = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    return Spool(options.spool, key)


def read_spooled(options: SourceOptions, place: Place) -> bytes:
    """Read a picture at a place of the spool."""
    _, start, size = place
    if options.spool is None:
        raise ValueError("spool: expected a folder for it, got none")
    return read_range(options.spool / NAME, int(start), int(size))


def read_range(path: Path, start: int, size: int) -> bytes:
    """Read a range of a file; raises Refused where the file ends before it."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        content = file.read(size)
        while len(content) < size and (more := file.read(size - len(content))):
            content += more
    if len(content) < size:
        raise Refused(
            f"expected {size} bytes at {start} of {path.name}, got {len(content)}",
            "copy the file again from where it came",
        )
    return content
