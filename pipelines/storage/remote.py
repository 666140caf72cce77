"""A split in object storage, opened for training: its table, its order and its shards."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.directory import COMPARED, HASHED_BYTES
from m3i_fast.pipelines.dataset.manifest import (
    Manifest,
    SplitInfo,
    read_manifest,
    sha256_file,
)
from m3i_fast.pipelines.dataset.sample_table import SampleTable, rows_fault
from m3i_fast.pipelines.sample_order.lanes import LaneOrder
from m3i_fast.pipelines.sample_order.positions import Mixture
from m3i_fast.pipelines.storage.cache import SharedCache
from m3i_fast.pipelines.storage.clumps import BucketShards, check_buffer, needed_bytes
from m3i_fast.pipelines.storage.dataset_copy import copy_description
from m3i_fast.pipelines.storage.objects import Bucket, RetryPolicy, url_of
from m3i_fast.pipelines.storage.read_pool import ReadPool
from m3i_fast.pipelines.threads import Cores


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


@dataclass(frozen=True, kw_only=True, slots=True)
class RemotePlan:
    """A split of which the order and the room are known, and no shard was looked at yet."""

    cfg: LoaderConfig
    bucket: Bucket
    path: Path
    manifest: Manifest
    order: LaneOrder
    num_ranks: int

    @property
    def split(self) -> SplitInfo:
        """Return what the manifest says of the split."""
        return self.manifest.split(self.cfg.split)

    @property
    def shard_sizes(self) -> list[int]:
        """Return the samples of each shard."""
        return [shard.num_samples for shard in self.split.shards]

    @property
    def shard_bytes(self) -> list[int]:
        """Return the bytes of each shard."""
        return [shard.num_bytes for shard in self.split.shards]

    @property
    def kept_batches(self) -> int:
        """Return after how many batches that do not use it a clump is given back.

        A lane has its turn again after a round of the rank's lanes, or of a mixture after as many
        as its data set has turns in; twice as long is waited for it. A backend still reads the
        batches that it prepares.
        """
        inputs = max(self.cfg.batch_size // self.order.images_per_input, 1)
        density = self.order.turns.density
        groups = self.order.lanes / density[density > 0].min()
        return 2 * math.ceil(groups / (self.num_ranks * inputs)) + 2 * self.cfg.prefetch + 4

    def needed_bytes(self, *, windows_a_lane: int = 1) -> NDArray[np.int64]:
        """Return the bytes of clumps that each rank holds, [num_ranks], as `needed_bytes`."""
        batch_size = self.cfg.batch_size
        ahead = -(-self.cfg.fetch_ahead // batch_size)
        return needed_bytes(
            self.shard_sizes,
            self.shard_bytes,
            density=self.order.turns.density,
            window=self.order.window,
            num_ranks=self.num_ranks,
            passing=(ahead + self.kept_batches + 1) * batch_size,
            windows_a_lane=windows_a_lane,
        )

    def open(self, pool: ReadPool) -> RemoteSplit:
        """Open the table and the shards; raises as `open_remote`."""
        cfg, manifest = self.cfg, self.manifest
        table = SampleTable.open(self.path, manifest, cfg.split)
        check_rows(self.bucket.url, table, manifest, cfg.split)
        cache = cfg.cache_dir.expanduser() / "clumps"
        shards = BucketShards(
            self.bucket,
            table,
            self.shard_sizes,
            self.shard_bytes,
            SharedCache(cache, round(cfg.cache_gib * 2**30)),
            identity=f"{manifest.digest} {cfg.split}",
            pool=pool,
            kept_batches=self.kept_batches,
        )
        return RemoteSplit(
            path=self.path,
            manifest=manifest,
            split=self.split,
            table=table,
            order=self.order,
            shards=shards,
        )


def plan_remote(
    cfg: LoaderConfig,
    *,
    num_ranks: int = 1,
    images_per_input: int = 1,
    policy: RetryPolicy | None = None,
    mixture: Mixture | None = None,
    dataset: int = 0,
) -> RemotePlan:
    """Copy manifest and table of a split whose shards lie under a URL, and lay out its order.

    `cfg.path` is that URL, or a folder with an index of tars that lie there. mixture, dataset:
    where it is one of several, what deals groups to it, and its number. Raises as `Bucket` and
    `described_in` do.
    """
    path, manifest = described_in(cfg.path, cfg.cache_dir.expanduser(), cfg.split, policy)
    bucket = Bucket(url_of(cfg.path) or manifest.shards_url or "", policy)
    order = LaneOrder(
        [shard.num_samples for shard in manifest.split(cfg.split).shards],
        seed=cfg.seed,
        lanes=cfg.lanes,
        window=cfg.clumps_a_window,
        images_per_input=images_per_input,
        mixture=mixture,
        dataset=dataset,
    )
    return RemotePlan(
        cfg=cfg,
        bucket=bucket,
        path=path,
        manifest=manifest,
        order=order,
        num_ranks=num_ranks,
    )


def check_plans(plans: Sequence[RemotePlan]) -> None:
    """Check the data sets of a run together.

    Ranks of a node are those that torchrun counts (LOCAL_WORLD_SIZE), or one. Raises ValueError,
    with what to set, for lanes that the ranks do not divide, and where the clumps of all data sets
    have no room.
    """
    if not plans:
        return
    for plan in plans:
        try:
            plan.order.check_ranks(plan.num_ranks, mixed=[p.order.lanes for p in plans])
        except ValueError as error:
            raise ValueError(f"{plan.bucket.url}: {error}") from error
    cfg, num_ranks = plans[0].cfg, plans[0].num_ranks
    needed, at_epoch_end = (
        int(np.sum([p.needed_bytes(windows_a_lane=n) for p in plans], axis=0).max()) for n in (1, 2)
    )
    check_buffer(
        needed,
        at_epoch_end=at_epoch_end,
        buffer_gib=cfg.buffer_gib,
        cache_gib=cfg.cache_gib,
        ranks_a_node=min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), num_ranks),
    )


def open_remote(
    cfg: LoaderConfig,
    *,
    num_ranks: int = 1,
    images_per_input: int = 1,
    cores: Cores | None = None,
    policy: RetryPolicy | None = None,
) -> RemoteSplit:
    """Open the split of the data set under a URL, `cfg.path`, for one of the ranks.

    cores: of the threads that fetch; None: where the system puts them. Raises as `plan_remote` and
    `check_plans` do, and ValueError for a table whose rows cannot be or a shard of another size
    than the manifest says.
    """
    plan = plan_remote(cfg, num_ranks=num_ranks, images_per_input=images_per_input, policy=policy)
    check_plans([plan])
    return plan.open(ReadPool(cfg.reads_in_flight, cores))


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
    for info in manifest.split(split).tables:
        if info.num_bytes > HASHED_BYTES:
            continue
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
