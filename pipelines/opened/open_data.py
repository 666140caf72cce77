"""Opening what a config names: a data set in a folder or a bucket, or a mixture, as one split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import Manifest, SplitInfo
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.opened.mixed_table import MixedShards, MixedTable
from m3i_fast.pipelines.opened.mixture import MixedData
from m3i_fast.pipelines.sample_order.lanes import LaneOrder
from m3i_fast.pipelines.sample_order.positions import ORDER_VERSION, Order
from m3i_fast.pipelines.storage.objects import place_of
from m3i_fast.pipelines.storage.read_pool import ReadPool
from m3i_fast.pipelines.storage.remote import (
    RemoteSplit,
    check_plans,
    open_remote,
    plan_remote,
    shards_url,
)
from m3i_fast.pipelines.storage.shards import LocalShards, Shards
from m3i_fast.pipelines.threads import Cores


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSplit:
    """A split that was checked and can be read."""

    path: Path
    manifest: Manifest
    split: SplitInfo
    table: SampleTable | MixedTable
    shards: Shards
    lanes: Mapping[int, LaneOrder] = field(default_factory=dict)
    """The order of each data set in object storage, by its number; all samples of others are
    shuffled."""

    @property
    def digest(self) -> str:
        """Return the digest of the data set, or of all that are mixed."""
        table = self.table
        return table.mixed.digest if isinstance(table, MixedTable) else self.manifest.digest

    @property
    def described(self) -> Manifest | MixedData:
        """Return what is known of the data: one manifest, or a mixture's."""
        return self.table.mixed if isinstance(self.table, MixedTable) else self.manifest

    def order(self, seed: int, images_per_input: int) -> Order | None:
        """Return which row of the table stands at each position; None: all rows are shuffled."""
        orders = {number: lanes.samples for number, lanes in self.lanes.items()}
        if isinstance(self.table, MixedTable):
            rows_at = self.table.mixed.rows_at
            return partial(rows_at, seed=seed, images_per_input=images_per_input, orders=orders)
        return orders.get(0)

    def order_identity(self, images_per_input: int) -> int | str:
        """Return what tells the order of the samples from another one."""
        if isinstance(self.table, MixedTable):
            of_lanes = [f"; {number}: {lanes.identity}" for number, lanes in self.lanes.items()]
            return f"{ORDER_VERSION}, mixed by {images_per_input}" + "".join(of_lanes)
        return f"{ORDER_VERSION}, {self.lanes[0].identity}" if self.lanes else ORDER_VERSION


def in_object_storage(cfg: LoaderConfig) -> bool:
    """Return whether any of the data lie in object storage, where lanes take the samples in turn.

    Raises as `shards_url`.
    """
    return any(shards_url(each.path) is not None for each in cfg.members or (cfg,))


def open_data(
    cfg: LoaderConfig,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    images_per_input: int = 1,
    cores: Cores | None = None,
) -> OpenSplit:
    """Check a split, of which each rank reads a part, and open its table.

    cores: of the threads that fetch from a bucket; None: where the system puts them.
    Raises as `open_split` does, `open_remote` for shards in object storage, and ValueError for data
    sets that cannot be mixed.
    """
    if cfg.mixture:
        return _open_mixture(
            cfg, rank=rank, num_ranks=num_ranks, images_per_input=images_per_input, cores=cores
        )
    if shards_url(cfg.path) is not None:
        return _read_remote(
            open_remote(cfg, num_ranks=num_ranks, images_per_input=images_per_input, cores=cores)
        )
    manifest, info = open_split(
        cfg.path,
        cfg.split,
        max_pixels=cfg.max_pixels,
        rank=rank,
        num_ranks=num_ranks,
    )
    table = SampleTable.open(cfg.path, manifest, cfg.split)
    return OpenSplit(
        path=cfg.path,
        manifest=manifest,
        split=info,
        table=table,
        shards=LocalShards(cfg.path, table),
    )


def _read_remote(remote: RemoteSplit) -> OpenSplit:
    return OpenSplit(
        path=remote.path,
        manifest=remote.manifest,
        split=remote.split,
        table=remote.table,
        shards=remote.shards,
        lanes={0: remote.order},
    )


def _open_mixture(
    cfg: LoaderConfig, *, rank: int, num_ranks: int, images_per_input: int, cores: Cores | None
) -> OpenSplit:
    """Open all data sets of a mixture as one, whose manifest is the first's with all classes.

    Those in object storage have their room and their threads together. Raises ValueError for one
    that has other captions than the first.
    """
    mixed = MixedData.read(cfg)
    _expect_same_captions(mixed)
    plans = {
        number: plan_remote(
            member,
            num_ranks=num_ranks,
            images_per_input=images_per_input,
            mixture=mixed.mixture,
            dataset=number,
        )
        for number, member in enumerate(cfg.members)
        if shards_url(member.path) is not None
    }
    check_plans([*plans.values()])
    pool = ReadPool(cfg.reads_in_flight, cores)
    opened = [
        _read_remote(plans[number].open(pool))
        if number in plans
        else open_data(member, rank=rank, num_ranks=num_ranks)
        for number, member in enumerate(cfg.members)
    ]
    tables = [each.table for each in opened]
    table = MixedTable(mixed, tuple(t for t in tables if isinstance(t, SampleTable)))
    return OpenSplit(
        path=opened[0].path,
        manifest=replace(opened[0].manifest, class_names=mixed.class_names),
        # Alternates are read where all data sets have them.
        split=replace(
            opened[0].split, max_alternates=min(each.split.max_alternates for each in opened)
        ),
        table=table,
        shards=MixedShards(table, [each.shards for each in opened]),
        lanes={number: plan.order for number, plan in plans.items()},
    )


def _expect_same_captions(mixed: MixedData) -> None:
    first = mixed.manifests[0].caption_member
    for part, manifest in zip(mixed.parts, mixed.manifests, strict=True):
        if manifest.caption_member != first:
            raise ValueError(
                f"data.mixture: expected captions in {first!r} as {place_of(mixed.parts[0].path)} "
                f"has them, got {manifest.caption_member!r} of {place_of(part.path)}"
            )
