"""The files of a data set wherever they lie: compared with the manifest, and read by ranges."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from m3i_fast.pipelines.dataset.manifest import (
    Manifest,
    SplitInfo,
    file_faults,
    how_to_restore,
    read_manifest,
)
from m3i_fast.pipelines.dataset.sample_table import Rows, SampleTable

Advance = Callable[[int], object]


class OpenFile(Protocol):
    """A file that is read by ranges."""

    def pread(self, count: int, offset: int, /) -> bytes:
        """Read `count` bytes from byte `offset` on, or fewer where the file ends before."""

    def close(self) -> None:
        """Give back what reading holds."""


class DatasetFiles(Protocol):
    """A data set's manifest, tables and shards."""

    @property
    def manifest(self) -> Manifest:
        """The manifest, which was read when this was made."""

    @property
    def place(self) -> str:
        """Path or URL of the data set, as errors name it."""

    @property
    def folder(self) -> Path:
        """Local folder of manifest and tables, or of copies that `faults` has made."""

    @property
    def restore(self) -> str:
        """What to do where files are missing or damaged."""

    def name(self, shard_file: str) -> str:
        """Return path or URL of a shard."""

    def faults(self, split: SplitInfo) -> Iterator[tuple[str, OSError | ValueError]]:
        """Yield (name of a file, error) of each that is missing or has another size.

        Of a table that has to be copied also where its digest differs.
        """

    def open(self, shard_file: str, *, is_whole: bool) -> OpenFile:
        """Open a shard. is_whole: it is read from begin to end, else here and there."""

    def samples(self, table: SampleTable, rows: Rows) -> Iterator[bytes]:
        """Yield the bytes of samples, in the order of these rows of a split's table."""


class LocalFile:
    """A file of this machine."""

    def __init__(self, path: Path | str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def pread(self, count: int, offset: int, /) -> bytes:
        """Read a range."""
        return os.pread(self._descriptor, count, offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class LocalFiles:
    """A dataset directory; raises as `read_manifest`."""

    def __init__(self, path: Path) -> None:
        self.manifest = read_manifest(path)
        self.folder, self.place = path, str(path)

    @property
    def restore(self) -> str:
        """Return what to do, as `how_to_restore`."""
        return how_to_restore(self.folder, self.manifest)

    def name(self, shard_file: str) -> str:
        """Return the path of a shard."""
        return str(self.manifest.shards_of(self.folder) / shard_file)

    def faults(self, split: SplitInfo) -> Iterator[tuple[str, OSError | ValueError]]:
        """Yield as `file_faults`."""
        return file_faults(self.folder, self.manifest, split)

    def open(self, shard_file: str, *, is_whole: bool) -> LocalFile:
        """Open a shard; the system reads ahead where that helps."""
        return LocalFile(self.name(shard_file))

    def samples(self, table: SampleTable, rows: Rows) -> Iterator[bytes]:
        """Yield the bytes of samples."""
        for row in rows:
            file = LocalFile(self.folder / table.shard_files[row["shard"]])
            try:
                yield file.pread(int(row["size"]), int(row["offset"]))
            finally:
                file.close()


def check_sizes(files: DatasetFiles, split: SplitInfo) -> None:
    """Raise the first error of `files.faults`, if there is one."""
    for _, error in files.faults(split):
        raise error
