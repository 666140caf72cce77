"""The table of a split: where every sample lies in the shards, with its ids, label and checksum.

A file of rows of 48 bytes that is mapped into memory, so that opening it takes as long for a
billion samples as for one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.columns import ColumnTable, Values
from m3i_fast.pipelines.dataset.manifest import Manifest, ShardInfo, TableInfo, read_manifest
from m3i_fast.pipelines.dataset.tar_shards import INTEGERS, TAR_BLOCK, IndexRow, read_index
from m3i_fast.pipelines.optional_imports import require

ROW = np.dtype(
    [
        ("offset", "<i8"),  # in the tar: first header of the sample's first member
        ("sample_id", "<i8"),
        ("group_id", "<i8"),
        ("size", "<u4"),  # up to the end of the padding of its last member, in bytes
        ("shard", "<u4"),  # its number in the split
        ("crc32c", "<u4"),  # of these bytes
        ("label", "<i4"),  # -1: none
        ("flags", "<u4"),
        ("zero", "<u4"),
    ]
)
BAD = 1  # flag: decided before training that the sample is not to be taken
NO_CRC = 2  # flag: the checksum is not known, as in data of format versions 1 to 3
NO_LABEL = -1
COPY_BYTES = 1 << 24

Rows = NDArray[np.void]  # [n] ROW


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The rows of a split, and the files that they point into."""

    rows: Rows
    # By number: in the dataset directory, absolute paths, or names of objects below a URL.
    shard_files: tuple[str, ...]
    has_bad: bool = True  # False: no row is marked as bad
    columns: ColumnTable | None = None  # of the same rows; None: there are none

    @classmethod
    def open(cls, path: Path, manifest: Manifest, split: str) -> SampleTable:
        """Open the table of a split of the dataset directory `path`.

        It is mapped into memory. For format versions 1 to 3 it is made of the shards' indices, in
        memory and without checksums (`NO_CRC`). Raises FileNotFoundError or ValueError where the
        file, or that of columns, does not have the size that the manifest records, or an index is
        wrong.
        """
        info = manifest.split(split)
        shards_in = None if manifest.shards_url else manifest.shards_in
        files = tuple(str(Path(shards_in or "", shard.file)) for shard in info.shards)
        if info.table is None:
            found = [_rows_of_index(path, number, s) for number, s in enumerate(info.shards)]
            return cls(np.concatenate(found), files, has_bad=False)
        file = path / info.table.file
        expected = info.num_samples * ROW.itemsize
        if not file.is_file():
            raise FileNotFoundError(f"{file}: expected the table of split {split}, got none")
        size = file.stat().st_size
        if not size == info.table.num_bytes == expected:
            raise ValueError(
                f"{file}: expected {expected} bytes of {info.num_samples} samples (manifest: "
                f"{info.table.num_bytes}), got {size}"
            )
        columns = None
        if info.columns is not None:
            columns = ColumnTable.open(
                path,
                manifest.columns,
                info.columns,
                num_samples=info.num_samples,
                vocab_size=manifest.tokenizer.vocab_size,
            )
        return cls(np.memmap(file, ROW, "r"), files, info.num_bad > 0, columns)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, numbers: NDArray[np.int64]) -> Rows:  # [N] -> [N]
        """Return rows by their number, copied out of the file."""
        return np.asarray(self.rows)[numbers]  # of a memory map every field would be one again

    def columns_at(self, numbers: NDArray[np.int64]) -> Values:  # [N]
        """Return the values of each column, by name; none without columns."""
        return {} if self.columns is None else self.columns.at(numbers)

    def same_set(
        self, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # [N] -> [N], [N]
        """Return the first row of each row's data set, and how many it has: all are of one."""
        return np.zeros_like(numbers), np.full_like(numbers, len(self))


def rows_fault(
    rows: Rows, numbers: NDArray[np.int64], manifest: Manifest, split: str
) -> str | None:
    """Return what is wrong with rows of a split's table, whatever the shards hold; None: nothing.

    numbers: [n] of each row in the table, to name it by.
    """
    shards = manifest.split(split).shards
    shard = np.minimum(rows["shard"], len(shards) - 1)
    offset, size = rows["offset"], rows["size"].astype(np.int64)
    num_bytes = np.array([s.num_bytes for s in shards])[shard]
    classes = len(manifest.class_names)
    checks = (
        ("shard", rows["shard"] < len(shards), f"a number below {len(shards)}"),
        ("offset", (offset >= 0) & (offset % TAR_BLOCK == 0), f"a multiple of {TAR_BLOCK}"),
        ("size", (size > 0) & (size % TAR_BLOCK == 0), f"a multiple of {TAR_BLOCK} above 0"),
        ("size", size <= num_bytes - np.minimum(offset, num_bytes), "an end within the tar"),
        ("label", (rows["label"] >= NO_LABEL) & (rows["label"] < classes), f"-1 to {classes - 1}"),
        ("sample_id", rows["sample_id"] >= 0, "at least 0"),
        ("group_id", rows["group_id"] >= 0, "at least 0"),
        ("flags", rows["flags"] <= BAD | NO_CRC, f"at most {BAD | NO_CRC}"),
        ("zero", rows["zero"] == 0, "0"),
    )
    for column, good, expected in checks:
        if not good.all():
            first = int(np.argmin(good))
            return f"row {numbers[first]}: {column}: expected {expected}, got {rows[column][first]}"
    return None


def write_table(file: Path, parts: Iterable[Rows]) -> TableInfo:
    """Write a table of the rows of all parts, beside its place and then renamed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.writing")
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        with temporary.open("wb") as out:
            for part in parts:
                content = np.ascontiguousarray(part, ROW).tobytes()
                digest.update(content)
                num_bytes += out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return TableInfo(file=file.name, num_bytes=num_bytes, sha256=digest.hexdigest())


def checksum(content: bytes) -> int:
    """Compute the CRC-32C (Castagnoli) of bytes."""
    return int(require("google_crc32c").value(content))


def split_digest(path: Path, name: str) -> str:
    """Hash a data set's name and the sample ids of a split to eight hex digits.

    It tells whether two figures were measured on the same pictures, whatever their annotations and
    the other splits. Raises as `SampleTable.open`.
    """
    manifest = read_manifest(path)
    table = SampleTable.open(path, manifest, name)
    samples = sorted(f"{sample:09d}" for sample in table.rows["sample_id"].tolist())
    return hashlib.sha256("|".join([manifest.name, *samples]).encode()).hexdigest()[:8]


def padded(size: int) -> int:
    """Return how many bytes of a tar a content takes: whole blocks."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _rows_of_index(path: Path, number: int, shard: ShardInfo) -> Rows:
    """Make the rows of a shard of format version 1 to 3, of its index and its integers."""
    index = read_index(path, shard)
    rows = np.zeros(len(index), ROW)
    rows["shard"], rows["flags"] = number, NO_CRC
    with (path / shard.file).open("rb") as tar:
        for i, (start, size) in enumerate(_ranges(index)):
            rows[i]["offset"], rows[i]["size"] = start, size
            found = {part.extension: part for part in index[i] if part.extension in INTEGERS}
            for column, name in zip(("label", "sample_id", "group_id"), INTEGERS, strict=True):
                stored = os.pread(tar.fileno(), 8, found[name].offset)
                rows[i][column] = _integer(stored, column, path / shard.file, found[name].name)
    return rows


def _integer(stored: bytes, column: str, file: Path, name: str) -> int:
    """Read an int64; ValueError where it is cut off.

    One that has no room in the column becomes its least or most value, which a reader refuses as
    out of range.
    """
    if len(stored) != 8:
        raise ValueError(f"{file}: {name}: expected 8 bytes, got {len(stored)}")
    limits = np.iinfo(ROW[column])
    return int(np.clip(np.frombuffer(stored, "<i8")[0], limits.min, limits.max))


def _ranges(index: list[IndexRow]) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of each sample, which begins where the one before it ends.

    The index has the offset of contents: long names put more than one header before them.
    """
    start = 0
    for row in index:
        end = max(part.offset + padded(part.size) for part in row)
        yield start, end - start
        start = end
