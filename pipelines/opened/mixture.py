"""Several data sets as one: their classes, samples and ids beside each other.

Rows of all data sets are counted one after the other: row r of the second is row S + r of all,
where the first has S. Legend: D data sets, N positions or rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from m3i_fast.config.data import LoaderConfig, MixturePart
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, joined, places_in
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, Manifest
from m3i_fast.pipelines.sample_order.positions import Integers, Mixture, Order
from m3i_fast.pipelines.storage.objects import place_of
from m3i_fast.pipelines.storage.remote import manifest_at

MAX_ID = 2**48
"""Ids of a data set in a mixture are below it: those of data set d are moved up by d times as much,
so that two data sets share none."""
NO_ID = -1  # of a sample whose own cannot be moved up: refused as what it is


@dataclass(frozen=True)
class MixedData:
    """What a mixture's data sets make together, as their manifests say.

    Raises ValueError where their tokenizers differ, or columns of one name.
    """

    parts: tuple[MixturePart, ...]
    manifests: tuple[Manifest, ...]

    @classmethod
    def read(cls, cfg: LoaderConfig) -> MixedData:
        """Read the manifests of a mixture's data sets; raises as `manifest_at` does as well."""
        return cls(cfg.mixture_parts, tuple(map(manifest_at, cfg.members)))

    def __post_init__(self) -> None:
        for part, manifest in zip(self.parts, self.manifests, strict=True):
            manifest.split(part.split)
            if manifest.tokenizer != self.tokenizer:
                raise ValueError(
                    f"{place_of(part.path)}/{MANIFEST_NAME}: tokenizer: expected that of "
                    f"{place_of(self.parts[0].path)}, {_told(self.tokenizer)}, as every data set "
                    f"of a mixture must have it, got {_told(manifest.tokenizer)}: pack one of "
                    "them again"
                )
        self.columns  # noqa: B018, raises

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Return the tokenizer that all of them have."""
        return self.manifests[0].tokenizer

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes of all data sets, in the order in which they are first named."""
        return tuple(dict.fromkeys(name for m in self.manifests for name in m.class_names))

    @cached_property
    def columns(self) -> tuple[ColumnInfo, ...]:
        """Return the named columns of all data sets, each with the names of all of them."""
        found: dict[str, ColumnInfo] = {}
        for part, manifest in zip(self.parts, self.manifests, strict=True):
            for column in manifest.columns:
                earlier = found.get(column.name, column)
                try:
                    found[column.name] = joined(earlier, column)
                except ValueError as error:
                    raise ValueError(f"{place_of(part.path)}/{MANIFEST_NAME}: {error}") from None
        return tuple(found.values())

    @cached_property
    def column_places(self) -> tuple[dict[str, tuple[ColumnInfo, Integers]], ...]:
        """Return each data set's own columns by name, with the places of their names in all."""
        whole = {column.name: column for column in self.columns}
        return tuple(
            {c.name: (c, places_in(c, whole[c.name])) for c in manifest.columns}
            for manifest in self.manifests
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return the samples of each data set's split."""
        pairs = zip(self.parts, self.manifests, strict=True)
        return tuple(manifest.split(part.split).num_samples for part, manifest in pairs)

    @cached_property
    def mixture(self) -> Mixture:
        """Return how groups of samples are dealt to the data sets."""
        return Mixture(self.sizes, tuple(part.weight for part in self.parts))

    @property
    def digest(self) -> str:
        """Return a hash (sha256) of all that decides which sample stands at which position."""
        shares = self.mixture.shares
        rows = [
            [manifest.digest, part.split, share]
            for part, manifest, share in zip(self.parts, self.manifests, shares, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @cached_property
    def _starts(self) -> Integers:  # [D]
        return np.cumsum([0, *self.sizes[:-1]], dtype=np.int64)

    @cached_property
    def _labels(self) -> tuple[Integers, Integers]:
        """Return each data set's labels in order, -1 first, as those of all; and where they begin.

        The lists stand one after the other: [sum of classes + D], [D].
        """
        places = {name: place for place, name in enumerate(self.class_names)}
        labels = [[-1, *(places[name] for name in m.class_names)] for m in self.manifests]
        starts = np.cumsum([0, *(len(each) for each in labels[:-1])], dtype=np.int64)
        return np.array([label for each in labels for label in each], np.int64), starts

    def rows_at(
        self,
        positions: Integers,
        *,
        seed: int,
        images_per_input: int,
        orders: Mapping[int, Order] | None = None,
    ) -> Integers:
        """Return the row of the sample at each position, counted over all data sets: [N] -> [N].

        orders: of data sets that are not shuffled as a whole, by number. Raises ValueError as
        `positions.shuffled`.
        """
        datasets, samples = self.mixture.samples(
            positions, seed=seed, images_per_input=images_per_input, orders=orders
        )
        return self._starts[datasets] + samples

    def split_rows(self, rows: Integers) -> tuple[Integers, Integers]:
        """Return the data set of each row and its row in it: [N] -> [N], [N]."""
        datasets = np.searchsorted(self._starts, rows, side="right") - 1
        return datasets, rows - self._starts[datasets]

    def labels(self, datasets: Integers, own: Integers) -> Integers:
        """Return labels by `class_names`: [N] of data sets, [N] of their own, -1 where none."""
        labels, starts = self._labels
        return labels[starts[datasets] + own + 1]

    def ids(self, datasets: Integers, own: Integers) -> Integers:
        """Return sample or group ids that no two data sets share: [N], [N] -> [N].

        Those of the first stay as they are. Ids outside of 0 to 2**48 - 1 become NO_ID.
        """
        return np.where((own < 0) | (own >= MAX_ID), NO_ID, datasets * MAX_ID + own)


def read_described(cfg: LoaderConfig) -> Manifest | MixedData:
    """Return what is known of the data that a config reads: one manifest, or a mixture's.

    Raises as `manifest_at` and `MixedData`.
    """
    return MixedData.read(cfg) if cfg.mixture else manifest_at(cfg)


def _told(tokenizer: TokenizerInfo) -> str:
    return (
        f"{tokenizer.vocab_size} ids, {tokenizer.context_length} a caption, "
        f"{tokenizer.fingerprint[:8]}"
    )
