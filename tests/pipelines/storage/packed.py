"""A packed data set whose shards have several clumps, and the readers of its copy in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.storage.cache import SharedCache
from m3i_fast.pipelines.storage.clumps import BucketShards
from m3i_fast.pipelines.storage.objects import Bucket, RetryPolicy
from m3i_fast.pipelines.storage.read_pool import ReadPool
from m3i_fast.pipelines.storage.shards import LocalShards

NUM_CLUMPS = 3 + 3 + 1  # of shards of 300, 300 and 50 samples
POLICY = RetryPolicy(request_s=20.0, first_wait_s=0.01, longest_wait_s=0.1)


def write(out: Path) -> Path:
    """Pack 650 pictures of 8 x 8."""
    from tests.shared.pipelines.data import encode_image, pack, sample, smooth_picture

    pictures = [encode_image(smooth_picture(i, 8, 8)) for i in range(20)]
    samples = [sample(i, pictures[i % 20]) for i in range(650)]
    return pack(out, samples, samples_per_shard=300)


def table_of(path: Path) -> SampleTable:
    return SampleTable.open(path, read_manifest(path), "train")


def sizes(path: Path) -> list[int]:
    return [shard.num_samples for shard in read_manifest(path).split("train").shards]


def readers(path: Path, url: str, cache: SharedCache, **options: Any) -> BucketShards:
    shards = read_manifest(path).split("train").shards
    return BucketShards(
        Bucket(url, options.pop("policy", POLICY)),
        table_of(path),
        [shard.num_samples for shard in shards],
        [shard.num_bytes for shard in shards],
        cache,
        identity="test",
        pool=ReadPool(options.pop("reads_in_flight", 32)),
        **options,
    )


def contents(
    table: SampleTable, places: Sequence[tuple[str, int]], samples: np.ndarray
) -> list[bytes]:
    """The bytes of each sample, read where it was located."""
    found = []
    for (path, offset), size in zip(places, table.rows["size"][samples].tolist(), strict=True):
        with open(path, "rb") as file:
            file.seek(offset)
            found.append(file.read(size))
            assert len(found[-1]) == size
    return found


def local_contents(path: Path, samples: np.ndarray) -> list[bytes]:
    table = table_of(path)
    return contents(table, LocalShards(path, table).locate(table, samples), samples)
