"""Samples before packing, and the checks of each of them and of all together."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.annotations.regions import wrong_regions
from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import ShardInfo, SplitInfo
from m3i_fast.pipelines.dataset.pictures import decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An encoded image with its captions, label and ids."""

    image: bytes
    extension: Literal["jpg", "png"]
    name: str
    sample_id: int
    group_id: int  # sample_id of the group's first sample
    captions: tuple[NDArray[np.int32], ...]  # [n] token ids of each; empty: no caption
    label: int  # -1: no label
    alternates: tuple[bytes, ...] = ()  # other pictures of the same thing, of the size of `image`
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What is known of it beside these, by column, as `ColumnInfo.row` takes it."""


def check_alternate(picture: bytes, extension: str, size: tuple[int, int], max_pixels: int) -> None:
    """Decode an alternate; raises ValueError where its format or size is not that of the image.

    They have to agree, since one box tells where views lie in either of them.
    """
    height, width = decode(picture, extension, max_pixels)
    if (height, width) != size:
        raise ValueError(
            f"another picture of it: expected {size[0]} x {size[1]} pixels, as the first has, got "
            f"{height} x {width}"
        )


class SampleSource(Protocol):
    """A sequence of samples that may be made on demand, such as a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Counts:
    """A count of the samples of a split, for its manifest."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._num_captions, self._total_captions, self._max_captions = 0, 0, 1
        self._with_alternates, self._max_alternates = 0, 0
        self._num_labels = 0
        self._groups = array("q")  # of each sample: 8 bytes

    def add(self, *, num_captions: int, num_alternates: int, label: int, group_id: int) -> None:
        """Count a sample; label: -1 for none."""
        self.num_samples += 1
        self._num_captions += num_captions > 0
        self._total_captions += num_captions
        self._max_captions = max(self._max_captions, num_captions)
        self._with_alternates += num_alternates > 0
        self._max_alternates = max(self._max_alternates, num_alternates)
        self._num_labels += label >= 0
        self._groups.append(group_id)

    def split(self, shards: Sequence[ShardInfo]) -> SplitInfo:
        """Return the entry of the manifest; ValueError where some samples alone have alternates."""
        if 0 < self._with_alternates < self.num_samples:
            raise ValueError(
                "expected other pictures of every sample or of none, got none of "
                f"{self.num_samples - self._with_alternates} of {self.num_samples}"
            )
        return SplitInfo(
            num_samples=self.num_samples,
            num_captions=self._num_captions,
            total_captions=self._total_captions,
            max_captions=self._max_captions,
            max_alternates=self._max_alternates,
            num_labels=self._num_labels,
            num_groups=len(np.unique(np.array(self._groups))),
            shards=tuple(shards),
        )


class Identities:
    """The ids of all splits, which two samples must not share, nor two splits a group."""

    def __init__(self) -> None:
        self.split_of: dict[int, str] = {}
        self.split_of_group: dict[int, str] = {}

    def add(self, sample_id: int, group_id: int, split: str) -> None:
        """Record a sample; raises ValueError for an id below 0, used twice or of another split."""
        if min(sample_id, group_id) < 0:
            raise ValueError(f"expected ids of at least 0, got {sample_id} of group {group_id}")
        if sample_id in self.split_of:
            raise ValueError(
                f"sample_id: expected another one for each sample, got {sample_id} twice"
            )
        self.split_of[sample_id] = split
        if self.split_of_group.setdefault(group_id, split) != split:
            raise ValueError(
                f"group_id: expected each in one split, got {group_id} in {split} and in "
                f"{self.split_of_group[group_id]}"
            )

    def check_groups(self, split: str) -> None:
        """Raise ValueError where a group of the split does not have the id of a sample of it."""
        for group, its_split in self.split_of_group.items():
            if its_split == split and self.split_of.get(group) != split:
                raise ValueError(
                    f"group_id: expected the sample_id of a sample of split {split}, got {group}"
                )


class Tally:
    """The checks of a dataset's samples while they are packed."""

    def __init__(
        self,
        tokenizer: TokenizerInfo,
        num_classes: int,
        max_pixels: int,
        columns: Sequence[ColumnInfo] = (),
    ) -> None:
        self.tokenizer, self.columns = tokenizer, columns
        self.num_classes = num_classes
        self.max_pixels = max_pixels
        self.identities = Identities()

    def check(self, sample: Sample, split: str) -> tuple[Sample, tuple[int, int]]:
        """Decode and check a sample; returns it with its upright (height, width).

        Raises ValueError that names it and what is wrong.
        """
        try:
            self.identities.add(sample.sample_id, sample.group_id, split)
            if not -1 <= sample.label < self.num_classes:
                raise ValueError(
                    f"expected a label from -1 to {self.num_classes - 1}, got {sample.label}"
                )
            fault = captions.fault(sample.captions, self.tokenizer)
            if fault is not None:
                raise ValueError(fault)
            self._check_columns(sample.columns)
            size = decode(sample.image, sample.extension, self.max_pixels)
            for picture in sample.alternates:
                check_alternate(picture, sample.extension, size, self.max_pixels)
        except ValueError as error:
            raise ValueError(f"sample {sample.name}: {error}") from error
        return sample, size

    def _check_columns(self, values: Mapping[str, Any]) -> None:
        names = [column.name for column in self.columns]
        if strange := [name for name in values if name not in names]:
            raise ValueError(f"columns: expected names among {names}, got {strange}")
        for column in self.columns:
            row = column.row(values.get(column.name))
            vocab_size = self.tokenizer.vocab_size
            if column.kind == "regions" and wrong_regions(row[None], vocab_size).any():
                raise ValueError(
                    f"{column.name}: expected token ids below {vocab_size}, got {row[:, 4:].max()}"
                )
            if column.kind == "text" and row.max() >= self.tokenizer.vocab_size:
                raise ValueError(
                    f"{column.name}: expected ids below {self.tokenizer.vocab_size}, got "
                    f"{row.max()}"
                )
