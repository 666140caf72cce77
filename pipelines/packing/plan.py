"""The plan of a pack: which pictures go into which split and shard, and with which ids."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from m3i_fast.pipelines.dataset.near_duplicates import MOST_BITS
from m3i_fast.pipelines.dataset.pack import keyed_hash, keyed_order, shard_name
from m3i_fast.pipelines.packing.items import Item, Listing
from m3i_fast.pipelines.packing.shard_task import Numbered

SPLIT_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")
Shards = dict[str, list[tuple[str, tuple[Numbered, ...]]]]  # by split: (name of the tar, pictures)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """How pictures are dealt to splits and shards."""

    splits: tuple[str, ...] = ()  # NAME or NAME=SHARE
    limit: int | None = None
    seed: int = 0
    samples_per_shard: int = 4096
    near_duplicate_bits: int | None = None  # None: groups are those of the source
    class_shares: tuple[str, ...] = ()  # NAME=SHARE

    def __post_init__(self) -> None:
        bits = self.near_duplicate_bits
        if bits is not None and not 0 <= bits <= MOST_BITS:
            raise ValueError(f"--group-near-duplicates: expected 0 to {MOST_BITS} bits, got {bits}")
        if self.samples_per_shard < 1:
            raise ValueError(
                f"--samples-per-shard: expected at least 1, got {self.samples_per_shard}"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: expected at least 1, got {self.limit}")


def chosen(num: int, settings: PlanSettings) -> Sequence[int]:
    """Return the places of the pictures that are taken, out of `num` of a listing."""
    if settings.limit is None or settings.limit >= num:
        return range(num)
    return sorted(keyed_order(num, "limit", settings.seed)[: settings.limit])


def number_items(
    listing: Listing, settings: PlanSettings, *, among: Container[int] | None = None
) -> dict[str, list[Numbered]]:
    """Deal the pictures of a listing to splits, and number them.

    A picture's id is its place in the listing, a group's id that of its first picture. among: ids
    of those that are numbered, where others were refused before; None: of all. Refuses
    pictures of a group that has pictures in an earlier split, or whose split has no good name.
    """
    items = [(i, listing.items[i]) for i in chosen(len(listing.items), settings)]
    splits = _deal(items, settings)
    split_of_group: dict[str, str] = {}
    numbered: dict[str, list[Numbered]] = {}
    for i, item in items:
        split = splits[i]
        if split is None or (among is not None and i not in among):
            continue
        if not SPLIT_NAME.fullmatch(split):
            listing.refuse(
                item.name,
                f"split: expected letters, digits and _, got {split[:40]!r}",
                "name it anew, or say --split-column ''",
            )
            continue
        if item.group and split_of_group.setdefault(item.group, split) != split:
            listing.refuse(
                item.name,
                f"of group {item.group[:40]!r} in split {split}, which has pictures in split "
                f"{split_of_group[item.group]}",
                "move it to that split: near-duplicates in two splits spoil an evaluation",
            )
            continue
        numbered.setdefault(split, []).append(Numbered(item, i, i))
    return with_groups(numbered, refused=())


def with_groups(
    numbered: dict[str, list[Numbered]], refused: Iterable[int]
) -> dict[str, list[Numbered]]:
    """Give each group the id of its first picture that is not refused.

    refused: ids of pictures.
    """
    left_out = set(refused)
    first: dict[str, int] = {}
    for pictures in numbered.values():
        for item, sample_id, _ in pictures:
            if item.group and sample_id not in left_out:
                first.setdefault(item.group, sample_id)
    return {
        split: [p._replace(group_id=first.get(p.item.group, p.sample_id)) for p in pictures]
        for split, pictures in numbered.items()
    }


def make_shards(numbered: dict[str, list[Numbered]], settings: PlanSettings) -> Shards:
    """Shuffle the pictures of each split over its shards, by a keyed order."""
    shards: Shards = {}
    size = settings.samples_per_shard
    for split, pictures in numbered.items():
        order = keyed_order(len(pictures), "order", settings.seed, split)
        shards[split] = [
            (
                shard_name(split, start // size),
                tuple(pictures[i] for i in order[start : start + size]),
            )
            for start in range(0, len(order), size)
        ]
    return shards


def _deal(items: Sequence[tuple[int, Item]], settings: PlanSettings) -> dict[int, str | None]:
    """Return the split of each picture by its id; None: it is left out.

    A NAME keeps that split of a source that has several, or names the only one. NAME=SHARE takes
    whole groups out of the only split, or that for training, in a keyed order until the share is
    reached.
    """
    names, shares = _parse(settings.splits)
    there = {item.split for _, item in items}
    taken_of = "train"
    if len(there) == 1 and len(names) <= 1:
        taken_of = (names or list(there))[0]
        splits: dict[int, str | None] = {i: taken_of for i, _ in items}
    else:
        if not set(names) <= there:
            said = ", ".join(sorted(there))
            raise ValueError(f"--split: expected some of {said}, which the source has, got {names}")
        splits = {i: item.split if item.split in (names or there) else None for i, item in items}
    groups: dict[str, list[int]] = {}
    for i, item in items:
        if splits[i] == taken_of:
            groups.setdefault(f"g{item.group}" if item.group else f"s{i}", []).append(i)
    order = sorted(groups, key=lambda group: keyed_hash("split", settings.seed, group))
    total = sum(map(len, groups.values()))
    for name, share in shares:
        if name in set(splits.values()):
            raise ValueError(f"--split {name}={share}: the source has a split {name} already")
        taken = 0
        while order and taken < round(share * total):
            members = groups[order.pop()]
            taken += len(members)
            splits.update(dict.fromkeys(members, name))
        if not taken or not order:
            raise ValueError(_share_fault(name, share, taken_of, total, len(groups)))
    return splits


def _share_fault(name: str, share: float, taken_of: str, total: int, num_groups: int) -> str:
    """Say why a share cannot be taken, and what to type."""
    said = f"--split {name}={share}: "
    if not total:
        return f"{said}expected a split {taken_of} to take it of, got none; leave it out"
    there = f"of {total} pictures in {num_groups} groups of split {taken_of}"
    if round(share * total) < 1:
        return f"{said}takes none {there}; type --split {name}={min(1 / total, 0.5):.2g} or more"
    return (
        f"{said}takes all {there}, since a group stays in one split; type a smaller share, or "
        "--group-column '' where the groups do not matter"
    )


def _parse(splits: Sequence[str]) -> tuple[list[str], list[tuple[str, float]]]:
    names, shares = [], []
    for text in splits:
        name, equals, share = text.partition("=")
        if not SPLIT_NAME.fullmatch(name):
            raise ValueError(f"--split: expected a name of letters, digits and _, got {text!r}")
        if not equals:
            names.append(name)
            continue
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not 0 < value < 1:
            raise ValueError(f"--split {name}=SHARE: expected a share in (0, 1), got {share!r}")
        shares.append((name, value))
    if sum(value for _, value in shares) >= 1:
        raise ValueError(f"--split: expected shares that leave something over, got {list(splits)}")
    return names, shares
