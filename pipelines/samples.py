"""Samples before packing, and what must hold of each of them and of all together."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines import captions
from m3i_fast.pipelines.extras import require
from m3i_fast.pipelines.manifest import ShardInfo, SplitInfo
from m3i_fast.pipelines.tokens import TokenizerInfo

PILLOW_FORMAT = {"jpg": "JPEG", "png": "PNG"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image with what is known of it."""

    image: bytes
    extension: Literal["jpg", "png"]
    name: str
    sample_id: int
    group_id: int  # sample_id of the group's first sample
    captions: tuple[NDArray[np.int32], ...]  # [n] token ids of each; empty: no caption
    label: int  # -1: no label


class SampleSource(Protocol):
    """Samples made on demand; a list of them will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def decode_size(image: bytes) -> tuple[str, int, int]:
    """(Pillow's format, height, width) of the upright image after a full decode.

    Whatever Pillow raises on corrupt data passes through, and ValueError where there is none.
    """
    pillow, ops = require("PIL.Image"), require("PIL.ImageOps")
    if not image:
        raise ValueError("empty image")
    with pillow.open(io.BytesIO(image)) as opened:
        width, height = ops.exif_transpose(opened).convert("RGB").size
        return str(opened.format), height, width


def image_size(sample: Sample) -> tuple[int, int]:
    """(height, width) of the upright image after a full decode; ValueError naming a bad sample."""
    try:
        found, height, width = decode_size(sample.image)
    except Exception as error:  # Pillow raises a dozen types on corrupt data
        raise ValueError(f"sample {sample.name}: corrupt or empty image: {error}") from error
    if found != PILLOW_FORMAT[sample.extension]:
        raise ValueError(f"sample {sample.name}: expected {sample.extension}, got {found} data")
    return height, width


class Counts:
    """What a manifest says of the samples of a split."""

    def __init__(self) -> None:
        self.captions: list[int] = []
        self.num_labels = 0
        self.groups: set[int] = set()

    def add(self, *, num_captions: int, label: int, group_id: int) -> None:
        self.captions.append(num_captions)
        self.num_labels += label >= 0
        self.groups.add(group_id)

    def split(self, shards: Sequence[ShardInfo]) -> SplitInfo:
        return SplitInfo(
            num_samples=len(self.captions),
            num_captions=sum(number > 0 for number in self.captions),
            total_captions=sum(self.captions),
            max_captions=max([1, *self.captions]),
            num_labels=self.num_labels,
            num_groups=len(self.groups),
            shards=tuple(shards),
        )


class Tally:
    """Counts a split while its samples pass, and holds what must be true of all of them."""

    def __init__(self, tokenizer: TokenizerInfo, num_classes: int) -> None:
        self.tokenizer = tokenizer
        self.num_classes = num_classes
        self.split_of: dict[int, str] = {}
        self.groups: dict[int, str] = {}
        self.sizes: set[tuple[int, int]] = set()
        self.extensions: set[str] = set()
        self.counts: dict[str, Counts] = {}

    def check(self, sample: Sample, split: str) -> Sample:
        """The sample, decoded and counted; ValueError naming it where something is wrong."""
        if sample.sample_id in self.split_of:
            raise ValueError(f"sample {sample.name}: sample_id {sample.sample_id} is used twice")
        self.split_of[sample.sample_id] = split
        if self.groups.setdefault(sample.group_id, split) != split:
            raise ValueError(
                f"sample {sample.name}: group {sample.group_id} is in split {split} "
                f"and in {self.groups[sample.group_id]}"
            )
        if not -1 <= sample.label < self.num_classes:
            raise ValueError(
                f"sample {sample.name}: expected a label from -1 to {self.num_classes - 1}, "
                f"got {sample.label}"
            )
        wrong = captions.fault(sample.captions, self.tokenizer)
        if wrong is not None:
            raise ValueError(f"sample {sample.name}: {wrong}")
        self.sizes.add(image_size(sample))
        self.extensions.add(sample.extension)
        counts = self.counts.setdefault(split, Counts())
        counts.add(num_captions=len(sample.captions), label=sample.label, group_id=sample.group_id)
        return sample

    def split(self, name: str, shards: list[ShardInfo]) -> SplitInfo:
        for group in self.counts[name].groups:
            if self.split_of.get(group) != name:
                raise ValueError(f"group {group} of split {name} holds no sample of that id")
        return self.counts[name].split(shards)
