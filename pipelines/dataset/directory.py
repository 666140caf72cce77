"""Opening a dataset directory: manifest, tables or indices, and tars are compared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.files import DatasetFiles, LocalFiles, OpenFile, check_sizes
from m3i_fast.pipelines.dataset.manifest import Manifest, ShardInfo, SplitInfo, sha256_file
from m3i_fast.pipelines.dataset.pictures import FORMATS, check_header
from m3i_fast.pipelines.dataset.sample_table import BAD, Rows, SampleTable, rows_fault
from m3i_fast.pipelines.dataset.tar_shards import check_tar, read_index
from m3i_fast.pipelines.tar_members import Range, sample_parts

READS_IN_FLIGHT = 8  # shards read at the same time, to hide the latency of network storage
# Opening takes as long for a billion samples as for a few: a table up to this size (1.4 million
# samples) is hashed and all its rows are checked, of a larger one those that are compared with the
# tars; the digest of any table is checked by verify.
HASHED_BYTES = 1 << 26
COMPARED = 256  # rows of each rank that are compared with the tars, spread evenly


def open_split(
    path: Path,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    rank: int = 0,
    num_ranks: int = 1,
) -> tuple[Manifest, SplitInfo]:
    """Read the manifest, and check that a split can be read as it says.

    rank, num_ranks: this rank and the number of ranks, each of which checks its share, so that all
    have to open a split before any reads from it. Raises FileNotFoundError or ValueError naming
    shard and sample, expected and got, and how to restore the files.
    """
    files = LocalFiles(path)
    split = files.manifest.split(name)
    check_sizes(files, split)
    try:
        check_split(files, name, max_pixels=max_pixels, rank=rank, num_ranks=num_ranks)
    except ValueError as error:
        raise ValueError(f"{error}; {files.restore}") from error
    return files.manifest, split


def check_split(
    files: DatasetFiles,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Compare manifest, table or indices, tar headers and picture headers.

    Other bytes are not read: a reader compares each sample's with its checksum. Of a table up to
    `COMPARED` samples a rank are compared with the tars, of indices all. Raises ValueError naming
    shard and sample, expected and got.
    """
    split = files.manifest.split(name)
    if split.table is not None:
        _check_table(files, name, max_pixels, rank, num_ranks)
    if None not in [shard.index_bytes for shard in split.shards]:
        _check_indices(files.folder, name, split, max_pixels, rank, num_ranks)


def _check_table(
    files: DatasetFiles, name: str, max_pixels: int, rank: int, num_ranks: int
) -> None:
    """Check the table of a split, and compare this rank's share of its rows with the tars."""
    manifest = files.manifest
    split = manifest.split(name)
    info = split.table
    assert info is not None
    table = SampleTable.open(files.folder, manifest, name)
    file = f"{files.place}/{info.file}"
    compared = np.unique(np.linspace(0, len(table) - 1, COMPARED * num_ranks).astype(np.int64))
    checked = compared
    if info.num_bytes <= HASHED_BYTES:
        digest = sha256_file(files.folder / info.file)
        if digest != info.sha256:
            raise ValueError(f"{file}: expected sha256 {info.sha256}, got {digest}")
        checked = np.arange(len(table))
    fault = rows_fault(table.rows[checked], checked, manifest, name)
    if fault is not None:
        raise ValueError(f"{file}: {fault}")
    _check_columns(files, table, split, compared)
    mine = table.rows[compared[rank::num_ranks]]

    def compare(shard: int) -> None:
        file, rows = split.shards[shard].file, mine[mine["shard"] == shard]
        tar = files.open(file, is_whole=False)
        try:
            _compare_rows(tar, files.name(file), rows, max_pixels, split.max_alternates)
        finally:
            tar.close()

    with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
        list(pool.map(compare, np.unique(mine["shard"]).tolist()))


def _check_columns(
    files: DatasetFiles, table: SampleTable, split: SplitInfo, compared: NDArray[np.int64]
) -> None:
    """Check a split's named columns: digest and all values, of a large file some values."""
    info = split.columns
    if info is None or table.columns is None:
        return
    file = files.folder / info.file
    if info.num_bytes <= HASHED_BYTES:
        if (digest := sha256_file(file)) != info.sha256:
            raise ValueError(f"{file}: expected sha256 {info.sha256}, got {digest}")
        compared = np.arange(len(table))
    if (fault := table.columns.fault(compared)) is not None:
        raise ValueError(fault)


def _compare_rows(
    tar: OpenFile, file: str, rows: Rows, max_pixels: int, max_alternates: int
) -> None:
    """Compare rows with the headers of the tar's files and pictures that they point to."""
    for row in rows:
        start, size = int(row["offset"]), int(row["size"])
        try:
            key, parts = sample_parts(Range(tar.pread, start, size), size)
            pictures = [part for part in parts if part.extension in FORMATS]
            if len(pictures) != 1:
                got = ", ".join(part.extension for part in parts)
                raise ValueError(f"{key}: expected one image ({', '.join(FORMATS)}), got {got}")
            if not row["flags"] & BAD:
                _, offset, num_bytes = pictures[0]
                _check_picture(tar, start + offset, num_bytes, key, max_pixels)
                others = {
                    part.extension: tar.pread(part.size, start + part.offset)
                    for part in parts
                    if part.extension in (alternates.PICTURES, alternates.SIZES)
                }
                alternates.check_stored(key, others, most=max_alternates, max_pixels=max_pixels)
        except ValueError as error:
            raise ValueError(
                f"{file}: sample {row['sample_id']} at byte {start}: {error}"
            ) from error


def _check_picture(tar: OpenFile, start: int, size: int, key: str, max_pixels: int) -> None:
    image = Range(tar.pread, start, size)

    def read(offset: int, count: int) -> bytes:
        image.seek(offset)
        return image.read(count)

    try:
        check_header(read, None, max_pixels)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _check_indices(
    path: Path, name: str, split: SplitInfo, max_pixels: int, rank: int, num_ranks: int
) -> None:
    """Compare the indices of format versions 1 to 3 with the tars."""

    def check(shard: ShardInfo) -> int:
        index = read_index(path, shard)
        check_tar(path, shard, index, max_pixels)
        num_bytes = [{part.extension: part.size for part in row} for row in index]
        _check_alternates(
            path / shard.file, split, [alternates.count(sizes) for sizes in num_bytes]
        )
        return max(map(captions.count, num_bytes))

    with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
        most_captions = max(pool.map(check, split.shards[rank::num_ranks]), default=0)
    # Batches have room for max_captions; a sample with more is named when it is read.
    if num_ranks == 1 and max(most_captions, 1) < split.max_captions:
        raise ValueError(
            f"{path}: split {name}: expected max_captions {split.max_captions} (manifest), got "
            f"{most_captions}"
        )


def _check_alternates(file: Path, split: SplitInfo, counts: list[int]) -> None:
    """Raise ValueError where a sample has more alternates than its split allows, or none."""
    least = min(split.max_alternates, 1)
    for count in counts:
        if not least <= count <= split.max_alternates:
            raise ValueError(
                f"{file}: expected {least} to {split.max_alternates} other pictures a sample "
                f"(manifest), got {count} of one"
            )
