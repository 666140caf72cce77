"""Opening a dataset directory: manifest, indices and tars are compared before DALI reads them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset import alternates, captions
from m3i_fast.pipelines.dataset.manifest import (
    Manifest,
    ShardInfo,
    SplitInfo,
    check_files,
    check_tokenizer,
    how_to_restore,
    read_manifest,
)
from m3i_fast.pipelines.dataset.tar_shards import check_tar, read_index

READS_IN_FLIGHT = 8  # shards read at the same time, to hide the latency of network storage


def open_split(
    path: Path,
    name: str,
    *,
    max_pixels: int = MAX_PIXELS,
    fingerprint: str | None = None,
    shard_id: int = 0,
    num_shards: int = 1,
) -> tuple[Manifest, SplitInfo]:
    """Read the manifest, and check that a split can be read as it says.

    fingerprint: that of the model's tokenizer. shard_id, num_shards: this rank and the number of
    ranks, each of which checks its share of the shards, so that all have to open a split before any
    reads from it. Raises FileNotFoundError or ValueError naming shard and sample, expected and got,
    and how to restore the files.
    """
    manifest = read_manifest(path)
    split = manifest.split(name)
    check_files(path, manifest, split)
    if fingerprint is not None:
        check_tokenizer(path, manifest, fingerprint)
    try:
        check_split(
            path, name, split, max_pixels=max_pixels, shard_id=shard_id, num_shards=num_shards
        )
    except ValueError as error:
        raise ValueError(f"{error}; {how_to_restore(path, manifest)}") from error
    return manifest, split


def check_split(
    path: Path,
    name: str,
    split: SplitInfo,
    *,
    max_pixels: int = MAX_PIXELS,
    shard_id: int = 0,
    num_shards: int = 1,
) -> None:
    """Compare manifest, indices, tar headers and picture headers, without reading other bytes.

    Raises ValueError naming shard and sample, expected and got.
    """

    def check(shard: ShardInfo) -> int:
        index = read_index(path, shard)
        check_tar(path, shard, index, max_pixels)
        num_bytes = [{part.extension: part.size for part in row} for row in index]
        _check_alternates(
            path / shard.file, split, [alternates.count(sizes) for sizes in num_bytes]
        )
        return max(map(captions.count, num_bytes))

    with ThreadPoolExecutor(READS_IN_FLIGHT) as pool:
        most_captions = max(pool.map(check, split.shards[shard_id::num_shards]), default=0)
    # Batches have room for max_captions; a sample with more is named when it is read.
    if num_shards == 1 and max(most_captions, 1) < split.max_captions:
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
