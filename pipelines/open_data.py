"""Opening what a config names: a data set in a folder or a bucket, or a mixture, as one split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch_rows import Order
from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import Manifest, SplitInfo
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.lanes import LaneOrder
from m3i_fast.pipelines.mixed_table import MixedShards, MixedTable
from m3i_fast.pipelines.mixture import MixedData
from m3i_fast.pipelines.order import ORDER_VERSION
from m3i_fast.pipelines.storage.remote import open_remote, shards_url
from m3i_fast.pipelines.storage.shards import LocalShards, Shards


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSplit:
    """A split that was checked and can be read."""

    path: Path
    manifest: Manifest
    split: SplitInfo
    table: SampleTable | MixedTable
    shards: Shards
    lanes: LaneOrder | None = None
    """The order of a data set in object storage; None: all samples are shuffled."""

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
        if isinstance(self.table, MixedTable):
            rows_at = self.table.mixed.rows_at
            return partial(rows_at, seed=seed, images_per_input=images_per_input)
        return self.lanes.samples if self.lanes else None

    def order_identity(self, images_per_input: int) -> int | str:
        """Return what tells the order of the samples from another one."""
        if isinstance(self.table, MixedTable):
            return f"{ORDER_VERSION}, mixed by {images_per_input}"
        return f"{ORDER_VERSION}, {self.lanes.identity}" if self.lanes else ORDER_VERSION


def open_data(
    cfg: LoaderConfig,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    images_per_input: int = 1,
) -> OpenSplit:
    """Check a split, of which each rank reads a part, and open its table.

    Raises as `open_split` does, `open_remote` for shards in object storage, and ValueError for data
    sets that cannot be mixed.
    """
    path, split = cfg.path, cfg.split
    if cfg.mixture:
        return _open_mixture(cfg, rank=rank, num_ranks=num_ranks)
    if shards_url(path) is not None:
        remote = open_remote(cfg, num_ranks=num_ranks, images_per_input=images_per_input)
        return OpenSplit(
            path=remote.path,
            manifest=remote.manifest,
            split=remote.split,
            table=remote.table,
            shards=remote.shards,
            lanes=remote.order,
        )
    manifest, info = open_split(
        path,
        split,
        max_pixels=cfg.max_pixels,
        rank=rank,
        num_ranks=num_ranks,
    )
    table = SampleTable.open(path, manifest, split)
    return OpenSplit(
        path=path,
        manifest=manifest,
        split=info,
        table=table,
        shards=LocalShards(path, table),
    )


def _open_mixture(cfg: LoaderConfig, *, rank: int, num_ranks: int) -> OpenSplit:
    """Open all data sets of a mixture as one, whose manifest is the first's with all classes.

    Raises ValueError for one that lies under a URL, or has other captions than the first.
    """
    opened = []
    for part in cfg.mixture_parts:
        if (url := shards_url(part.path)) is not None:
            raise ValueError(f"data.mixture: expected shards in folders, got {url}")
        one = replace(cfg, path=part.path, split=part.split, mixture=())
        opened.append(open_data(one, rank=rank, num_ranks=num_ranks))
    first = opened[0]
    for other in opened:
        if other.manifest.caption_member != first.manifest.caption_member:
            raise ValueError(
                f"data.mixture: expected captions in {first.manifest.caption_member!r} as "
                f"{first.path} has them, got {other.manifest.caption_member!r} of {other.path}"
            )
    mixed = MixedData(cfg.mixture_parts, tuple(each.manifest for each in opened))
    tables = [each.table for each in opened]
    table = MixedTable(mixed, tuple(t for t in tables if isinstance(t, SampleTable)))
    return OpenSplit(
        path=first.path,
        manifest=replace(first.manifest, class_names=mixed.class_names),
        # Alternates are read where all data sets have them.
        split=replace(
            first.split, max_alternates=min(each.split.max_alternates for each in opened)
        ),
        table=table,
        shards=MixedShards(table, [each.shards for each in opened]),
    )
