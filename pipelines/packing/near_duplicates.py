"""Groups of near duplicates: a pass over all pictures before they are dealt to splits and shards.

Two pictures are near duplicates where their hashes differ in few bits and their thumbnails are
nearer than `NEARER_THAN`: the hashes find pairs quickly, the thumbnails keep apart what is as flat
or as symmetric. Near duplicates of one split, and of those again, are one group. Splits stay as the
source has them: near duplicates in two of them are counted, and not joined.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.near_duplicates import (
    HASHED_SIDE,
    NEARER_THAN,
    SIDE,
    Clusters,
    hash_pairs,
    perceptual_hash,
)
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.packing.conversion import small_picture
from m3i_fast.pipelines.packing.items import (
    Item,
    Refused,
    SourceOptions,
    Stamp,
    check_listed,
    keyed,
    refusal_of,
)
from m3i_fast.pipelines.packing.output import STATE, Output
from m3i_fast.pipelines.packing.shard_task import opened_reader
from m3i_fast.pipelines.storage.requests import Stop

PICTURES_A_TASK = 4096
_PAIRS_AT_ONCE = 1 << 14  # whose thumbnails are compared at once
_FEWEST_PIXELS = 2 * HASHED_SIDE  # of a side that a JPEG is decoded to

# What is kept of a picture: 441 bytes. `is_there` is False for one that cannot be read or decoded,
# which its shard then refuses.
HASHED = np.dtype(
    [("is_there", "?"), ("hash", "<u8"), ("thumbnail", "u1", SIDE * SIDE * 3)], align=False
)
Hashed = NDArray[np.void]  # [N] of HASHED


@dataclass(frozen=True, kw_only=True, slots=True)
class HashTask:
    """Pictures that are to be hashed."""

    out: Output
    number: int
    items: tuple[Item, ...]
    source: SourceOptions
    files: Mapping[str, Stamp]  # as of `Listing`
    max_pixels: int

    @property
    def key(self) -> bytes:
        """Hash of all that the result depends on."""
        content = [self.max_pixels, *keyed(self.items, self.files, is_shared=self.out.is_shared)]
        return hashlib.sha256(json.dumps(content).encode()).digest()

    @property
    def file(self) -> str:
        """Name of the result in DIR."""
        return f"{STATE}/{self.number:06d}.hashes"

    def run(self, advance: Callable[[int], None]) -> Hashed:
        """Hash the pictures, and keep the result for a later start."""
        reader = opened_reader(self.source)
        hashed = np.zeros(len(self.items), HASHED)
        for row, item in enumerate(self.items):
            try:
                content = reader.read(item.place, item.stamp)
                hashed[row] = (True, *_hash(content, self.max_pixels))
            except Refused:
                pass  # its shard refuses it, and says why
            except OSError as error:
                refusal_of(error, self.source.path)  # raises where it says nothing of the picture
            advance(1)
        check_listed(reader.folder, self.files)
        self.out.write(self.file, self.key + hashed.tobytes())
        return hashed

    def finished(self, sizes: Mapping[str, int], stop: Stop) -> Hashed | None:
        """Return the result of an earlier start for the same pictures.

        sizes: bytes of each file that the output has. stop: as of `Output.read`.
        """
        stored = self.out.read(self.file, stop) if self.file in sizes else None
        if stored is None or not stored.startswith(self.key):
            return None
        return np.frombuffer(stored[len(self.key) :], HASHED)


def hash_tasks(
    items: Sequence[Item],
    out: Output,
    source: SourceOptions,
    files: Mapping[str, Stamp],
    max_pixels: int,
) -> list[HashTask]:
    """Return the tasks that hash pictures, in their order."""
    return [
        HashTask(
            out=out,
            number=number,
            items=tuple(items[start : start + PICTURES_A_TASK]),
            source=source,
            files=files,
            max_pixels=max_pixels,
        )
        for number, start in enumerate(range(0, len(items), PICTURES_A_TASK))
    ]


def _hash(content: bytes, max_pixels: int) -> tuple[int, NDArray[np.uint8]]:
    """Return the hash and the thumbnail of a picture."""
    small = small_picture(content, max_pixels=max_pixels, least_side=_FEWEST_PIXELS)
    resampling = require("PIL.Image").Resampling
    gray = small.convert("L").resize((HASHED_SIDE, HASHED_SIDE), resampling.LANCZOS)
    thumbnail = small.resize((SIDE, SIDE), resampling.BOX)
    return perceptual_hash(np.asarray(gray)), np.asarray(thumbnail).ravel()


class Grouped(NamedTuple):
    """Pictures with the groups of their near duplicates."""

    items: list[Item]
    num_pictures: int  # that share a group with a near duplicate
    num_groups: int  # of them
    num_elsewhere: int  # pictures with a near duplicate in another split


def group(items: Sequence[Item], hashed: Hashed, most_bits: int) -> Grouped:
    """Give near duplicates of one split one group, and with them its pictures of their groups.

    hashed: of each item. The groups depend on the pictures and their order alone, and have pictures
    of one split each: a group of the source that has pictures in two splits does not join them.
    """
    number_of: dict[str, int] = {}
    splits = np.array([number_of.setdefault(item.split, len(number_of)) for item in items])
    clusters, first_of = Clusters(), dict[tuple[str, str], int]()
    for number, item in enumerate(items):
        if item.group:
            clusters.join(first_of.setdefault((item.split, item.group), number), number)
    first = _first_equal(hashed, splits)
    copies = np.flatnonzero(first != np.arange(len(first)))
    near, elsewhere = set(copies.tolist()), set[int]()
    for one, other in zip(first[copies].tolist(), copies.tolist(), strict=True):
        clusters.join(one, other)
    for rows, others in _near_pairs(hashed, first, most_bits):
        apart = splits[rows] != splits[others]
        elsewhere.update(rows[apart].tolist(), others[apart].tolist())
        for one, other in zip(rows[~apart].tolist(), others[~apart].tolist(), strict=True):
            clusters.join(one, other)
            near.add(one)
    joined = {clusters[number] for number in near}
    grouped = list(items)
    num_pictures = 0
    for number, item in enumerate(items):
        if (least := clusters[number]) in joined:
            grouped[number] = item._replace(group=f"near duplicates of {items[least].name}")
            num_pictures += 1
    num_elsewhere = int(np.isin(first, list(elsewhere)).sum())
    return Grouped(grouped, num_pictures, len(joined), num_elsewhere)


def _first_equal(hashed: Hashed, splits: NDArray[np.int64]) -> NDArray[np.int64]:  # [N] -> [N]
    """Return of each picture the first one of its split with the same hash and thumbnail.

    Only that one is compared with others: of many copies all pairs would be many more.
    """
    first = np.arange(len(hashed))
    there = np.flatnonzero(hashed["is_there"])
    _, of_hash, counts = np.unique(hashed["hash"][there], return_inverse=True, return_counts=True)
    rows = there[counts[of_hash] > 1]
    content = np.empty(len(rows), [("split", "<i8"), ("hashed", HASHED)])
    content["split"], content["hashed"] = splits[rows], hashed[rows]
    keys = content.view(f"V{content.itemsize}")
    _, index, of_key = np.unique(keys, return_index=True, return_inverse=True)
    first[rows] = rows[index[of_key]]
    return first


def _near_pairs(
    hashed: Hashed, first: NDArray[np.int64], most_bits: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield rows and others of the near pairs of pictures that are their own first ones."""
    numbers = np.flatnonzero(hashed["is_there"] & (first == np.arange(len(first))))
    hashes = hashed["hash"][numbers].astype(np.uint64)
    limit = (NEARER_THAN * 255) ** 2 * hashed["thumbnail"].shape[1]
    for rows, others in hash_pairs(hashes, most_bits):
        for start in range(0, len(rows), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            one, other = numbers[rows[some]], numbers[others[some]]
            apart = hashed["thumbnail"][one].astype(np.int32) - hashed["thumbnail"][other]
            near = np.square(apart).sum(1) < limit
            yield one[near], other[near]
