"""A split in object storage, opened for training: its table, its order and its shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.directory import COMPARED, HASHED_BYTES
from m3i_fast.pipelines.dataset.manifest import (
    Manifest,
    SplitInfo,
    read_manifest,
    sha256_file,
)
from m3i_fast.pipelines.dataset.sample_table import SampleTable, rows_fault
from m3i_fast.pipelines.lanes import LaneOrder
from m3i_fast.pipelines.storage.cache import SharedCache
from m3i_fast.pipelines.storage.clumps import BucketShards, check_buffer, needed_bytes
from m3i_fast.pipelines.storage.dataset_copy import copy_description
from m3i_fast.pipelines.storage.objects import Bucket, RetryPolicy, url_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteSplit:
    """What a loader reads from, as of a folder, and the order that it reads in."""

    path: Path
    """Folder with the copies of manifest and table."""
    manifest: Manifest
    split: SplitInfo
    table: SampleTable
    order: LaneOrder
    shards: BucketShards


def open_remote(
    cfg: LoaderConfig,
    *,
    num_ranks: int = 1,
    images_per_input: int = 1,
    policy: RetryPolicy | None = None,
) -> RemoteSplit:
    """Open the split of a data set for one of the ranks, whose shards lie under a URL.

    `cfg.path` is that URL, or a folder with an index of tars that lie there. Ranks of a node are
    those that torchrun counts (LOCAL_WORLD_SIZE), or one. Raises as `Bucket` and `described_in` do,
    and ValueError for lanes that the ranks do not divide, clumps that have no room, with what to
    set, or a table whose rows cannot be.
    """
    cache_dir = cfg.cache_dir.expanduser()
    path, manifest = described_in(cfg.path, cache_dir, cfg.split, policy)
    bucket = Bucket(url_of(cfg.path) or manifest.shards_url or "", policy)
    split = manifest.split(cfg.split)
    sizes = [shard.num_samples for shard in split.shards]
    num_bytes = [shard.num_bytes for shard in split.shards]
    order = LaneOrder(
        sizes,
        seed=cfg.seed,
        lanes=cfg.lanes,
        window=cfg.clumps_a_window,
        images_per_input=images_per_input,
    )
    order.check_ranks(num_ranks)
    needed = needed_bytes(
        sizes,
        num_bytes,
        lanes=order.lanes,
        window=order.window,
        num_ranks=num_ranks,
        fetch_ahead=cfg.fetch_ahead,
    )
    ranks_a_node = min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), num_ranks)
    check_buffer(
        needed, buffer_gib=cfg.buffer_gib, cache_gib=cfg.cache_gib, ranks_a_node=ranks_a_node
    )
    table = SampleTable.open(path, manifest, cfg.split)
    check_rows(bucket.url, table, manifest, cfg.split)
    shards = BucketShards(
        bucket,
        table,
        sizes,
        num_bytes,
        SharedCache(cache_dir / "clumps", round(cfg.cache_gib * 2**30)),
        identity=manifest.digest,
        reads_in_flight=cfg.reads_in_flight,
        kept_batches=kept_batches(cfg, order, num_ranks),
    )
    return RemoteSplit(
        path=path, manifest=manifest, split=split, table=table, order=order, shards=shards
    )


def check_rows(url: str, table: SampleTable, manifest: Manifest, split: str) -> None:
    """Raise ValueError for rows of a table that cannot be, or that are not in order of shards.

    All rows are checked, or of a table of more than `HASHED_BYTES` the first and the last one of
    each shard and `COMPARED` others.
    """
    info = manifest.split(split)
    starts = np.cumsum([0, *(shard.num_samples for shard in info.shards)])
    numbers = np.arange(len(table))
    if table.rows.nbytes > HASHED_BYTES:
        spread = np.linspace(0, len(table) - 1, COMPARED).astype(np.int64)
        numbers = np.unique(np.concatenate([starts[:-1], starts[1:] - 1, spread]))
    rows = table.at(numbers)
    fault = rows_fault(rows, numbers, manifest, split)
    shards = np.searchsorted(starts, numbers, "right") - 1
    wrong = np.flatnonzero(rows["shard"] != shards)
    if fault is None and wrong.size:
        first = wrong[0]
        fault = (
            f"row {numbers[first]}: expected a sample of shard {shards[first]} (the manifest's "
            f"numbers of samples), got shard {rows['shard'][first]}"
        )
    if fault is not None:
        raise ValueError(
            f"{url}: table of split {split}: {fault}; pack the pictures again and upload them"
        )


def shards_url(path: Path) -> str | None:
    """Return the URL of the shards of a data set, where they lie in object storage.

    path: a URL, or a folder, whose manifest may say one. Raises as `read_manifest`.
    """
    return url_of(path) or read_manifest(path).shards_url


def described_in(
    path: Path, cache_dir: Path, split: str, policy: RetryPolicy | None = None
) -> tuple[Path, Manifest]:
    """Return the folder with manifest and table of a split, and the manifest.

    Those of a URL are copied; those of a folder are compared as `open_split` does. Raises as
    `copy_description`, `read_manifest` and `SampleTable.open`.
    """
    if url_of(path) is not None:
        return copy_description(Bucket(path, policy), cache_dir, split)
    manifest = read_manifest(path)
    SampleTable.open(path, manifest, split)
    info = manifest.split(split).table
    if info is not None and info.num_bytes <= HASHED_BYTES:
        got = sha256_file(path / info.file)
        if got != info.sha256:
            raise ValueError(f"{path / info.file}: expected sha256 {info.sha256}, got {got}")
    return path, manifest


def manifest_at(cfg: LoaderConfig) -> Manifest:
    """Read the manifest of a data set in a folder or under a URL.

    Raises as `read_manifest` and `folder_at` do.
    """
    return read_manifest(folder_at(cfg))


def folder_at(cfg: LoaderConfig) -> Path:
    """Return the folder with manifest and table of a config's split; for a URL they are copied.

    Raises as `Bucket` and `copy_description` do.
    """
    if url_of(cfg.path) is None:
        return cfg.path
    return copy_description(Bucket(cfg.path), cfg.cache_dir.expanduser(), cfg.split)[0]


def kept_batches(cfg: LoaderConfig, order: LaneOrder, num_ranks: int) -> int:
    """Return after how many batches that do not use it a clump is given back.

    A lane has its turn again after a round of the rank's lanes, and a backend still reads the
    batches that it prepares.
    """
    inputs = max(cfg.batch_size // order.images_per_input, 1)
    return 2 * -(-order.lanes // (num_ranks * inputs)) + 2 * cfg.prefetch + 4
