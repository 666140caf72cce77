"""Pictures that their source cannot hand out in any order, copied one after the other to a file."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from m3i_fast.pipelines.packing.items import Place, Refused, SourceOptions, check_num_bytes

NAME = "spool"


class Spool:
    """A file that pictures are appended to, and read from at their places.

    A row of a Parquet file or of a compressed tar is reached by reading all before it, and packing
    reads in a shuffled order: one copy costs less than reading the source again for each shard.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._temporary = folder / f".{NAME}.tmp-{os.getpid()}"
        self._file = self._temporary.open("wb")
        self._size = 0

    def append(self, content: bytes) -> Place:
        """Append a picture and return its place; raises Refused where it is too large."""
        check_num_bytes(len(content))
        start = self._size
        self._file.write(content)
        self._size += len(content)
        return (NAME, start, len(content))

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            self._temporary.unlink()


def open_spool(options: SourceOptions) -> Spool:
    """Open the spool of a source."""
    if options.spool is None:
        raise ValueError("spool: expected a folder for it, got none")
    return Spool(options.spool)


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
