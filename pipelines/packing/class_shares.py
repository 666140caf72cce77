"""Named columns that hold the class of a share of the pictures, for runs that are to see no more.

Of each split and class the pictures of lowest keyed hash are kept, so that a larger share contains
a smaller one, as of `sources.label_subsets.keep_share`. The data set's own class stays whole: it is
what a probe is fitted to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.packing.items import Listing
from m3i_fast.pipelines.packing.shard_task import Numbered
from m3i_fast.pipelines.sources.label_subsets import keep_share


def shares_of(flags: Sequence[str]) -> dict[str, float]:
    """Read NAME=SHARE of each flag; ValueError where one is wrong."""
    shares: dict[str, float] = {}
    for flag in flags:
        name, _, text = flag.partition("=")
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1 or name in shares:
            raise ValueError(
                f"--class-share: expected NAME=SHARE with a share in (0, 1] and each name once, "
                f"got {flag!r}"
            )
        ColumnInfo(name=name, kind="class", names=("0",))  # its name
        shares[name] = share
    return shares


def share_columns(listing: Listing, flags: Sequence[str]) -> tuple[ColumnInfo, ...]:
    """Describe the columns; ValueError where there are no classes, or a column of that name."""
    shares = shares_of(flags)
    if shares and not listing.class_names:
        raise ValueError(
            f"--class-share: expected pictures with classes to keep a share of ({', '.join(flags)})"
            ", got none: name their column by --label-column"
        )
    if taken := sorted({column.name for column in listing.columns} & shares.keys()):
        raise ValueError(f"--class-share: expected new names, got columns {', '.join(taken)}")
    return tuple(ColumnInfo(name=name, kind="class", names=listing.class_names) for name in shares)


def with_shares(
    numbered: dict[str, list[Numbered]], flags: Sequence[str], seed: int
) -> dict[str, list[Numbered]]:
    """Give each picture the columns: its class where it is kept, else None."""
    shares = shares_of(flags)
    if not shares:
        return numbered
    return {split: _of_split(pictures, shares, seed) for split, pictures in numbered.items()}


def _of_split(pictures: Sequence[Numbered], shares: dict[str, float], seed: int) -> list[Numbered]:
    class_of = {p.sample_id: str(p.item.label) for p in pictures if p.item.label >= 0}
    kept = {name: keep_share(class_of, share, "class", seed) for name, share in shares.items()}
    found = []
    for picture in pictures:
        values = tuple(
            (name, picture.item.label if picture.sample_id in ids else None)
            for name, ids in kept.items()
        )
        item = picture.item._replace(columns=(*picture.item.columns, *values))
        found.append(picture._replace(item=item))
    return found


def told(numbered: Mapping[str, Sequence[Numbered]], flags: Sequence[str]) -> Iterator[str]:
    """Say of how many pictures each column has the class."""
    for name in shares_of(flags):
        for split, pictures in numbered.items():
            known = sum(dict(picture.item.columns)[name] is not None for picture in pictures)
            yield f"{name}: the class of {known} of {len(pictures)} pictures of {split}"
