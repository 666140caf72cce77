"""What is measured on: the pictures, labels and captions of a folder, dealt into two splits.

All that `m3i-fast data pack` reads is read, by its readers, and a packed data set as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from m3i_fast.config.data import CACHE_DIR, MAX_PIXELS
from m3i_fast.durable_files import expect_local, what_is_at
from m3i_fast.evaluation.feature_rows import Index
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.packing.items import Item, Listing, Refusal, SourceOptions
from m3i_fast.pipelines.packing.plan import PlanSettings, number_items
from m3i_fast.pipelines.packing.readers.guess import make_reader, resolve
from m3i_fast.pipelines.packing.shard_task import Numbered

TRAIN = "train"
MEASURED = ("heldout", "test", "tune")  # the first of them that a source has is measured on

MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSettings:
    """Which data are measured on, and how they are read."""

    path: Path
    kind: str = "auto"
    """As `m3i-fast data pack --kind`, or packed."""
    image_column: str | None = None
    caption_columns: tuple[str, ...] = ()
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    json_captions: tuple[str, ...] = ()
    image_root: Path | None = None
    delimiter: str | None = None
    allow_outside: bool = False
    max_unpacked_gib: float | None = None
    torchvision_class: str | None = None
    classes: tuple[str, ...] = ()
    """Name of each class by its index; empty: those of the source."""
    train_split: str = TRAIN
    split: str | None = None
    """Split that is measured on; None: the first of `MEASURED`, or a share of the only one."""
    share: float = 0.2
    """Share of the pictures that are measured on, where the source has one split."""
    seed: int = 0
    max_pixels: int = MAX_PIXELS
    cache_dir: Path = CACHE_DIR


@dataclass(frozen=True)
class Split:
    """The rows of a split, in the order of the source."""

    name: str
    items: tuple[Item, ...]
    group: Index  # [N]

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def label(self) -> Index:  # [N], -1 for none
        return np.array([item.label for item in self.items], dtype=np.int64)

    @cached_property
    def captions(self) -> tuple[str, ...]:  # [M]
        return tuple(text for item in self.items for text in item.captions)

    @cached_property
    def caption_row(self) -> Index:  # [M] the row that each caption is of
        counts = [len(item.captions) for item in self.items]
        return np.repeat(np.arange(len(self.items)), counts)

    @property
    def num_labelled(self) -> int:
        """Rows with a label."""
        return int((self.label >= 0).sum())

    @property
    def num_captioned(self) -> int:
        """Rows with a caption."""
        return len(np.unique(self.caption_row))

    @property
    def classes(self) -> Index:
        """Classes that any row has, ascending."""
        return np.unique(self.label[self.label >= 0])


@dataclass(frozen=True)
class Source:
    """The pictures that are measured on, none of which has been decoded."""

    options: SourceOptions
    """What a reader of it is made of, in any process."""
    class_names: tuple[str, ...]
    train: Split | None
    """Rows with labels that classifiers are fitted to; None: there are none."""
    measured: Split
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    digest: str
    """Of names, places, labels, captions, the files' sizes and times and the columns and flags that
    they are read by; of a packed data set its own, and with that of every byte."""
    max_pixels: int

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that are encoded."""
        return (self.measured,) if self.train is None else (self.train, self.measured)

    def split_digest(self, split: Split) -> str:
        """Return the digest of one split's rows in this source."""
        rows = [[*item] for item in split.items]
        return _digest([self.digest, split.name, rows, split.group.tolist()])


def read_source(settings: SourceSettings) -> Source:
    """List a source and deal its pictures into those for fitting and those that are measured on.

    No picture is decoded. Raises FileNotFoundError and ValueError as packing does, and ValueError
    for a split that is not there or has no rows.
    """
    options, why = _resolve(settings)
    reader = make_reader(options)
    listing = reader.list()
    files = {**listing.files, "": _packed_digest(options)}
    notes = [f"source: {why}", *listing.notes]
    numbered, more = _deal(listing, settings)
    if not numbered:
        raise ValueError(
            f"--data: expected a picture that can be used, got none of {len(listing.refusals)} in "
            f"{settings.path}{_first(listing.refusals)}"
        )
    measured = _measured_name(numbered, settings)
    splits = {name: _split(name, rows) for name, rows in numbered.items()}
    train = splits.get(settings.train_split) if settings.train_split != measured else None
    if train is not None and train.num_labelled == 0:
        train = None  # nothing is fitted to rows without labels
    names = settings.classes or listing.class_names
    _expect_names(listing.class_names, settings)
    if settings.classes:
        notes.append(_renamed(listing.class_names, names))
    return Source(
        options=options,
        class_names=names,
        train=train,
        measured=splits[measured],
        refusals=tuple(listing.refusals),
        notes=(*notes, *more),
        digest=_digest([_read_as(options), listing.class_names, files]),
        max_pixels=settings.max_pixels,
    )


def _resolve(settings: SourceSettings) -> tuple[SourceOptions, str]:
    expect_local(settings.path, "--data")
    if not settings.path.exists():
        raise FileNotFoundError(
            f"--data: expected a file or folder, got {what_is_at(settings.path)}"
        )
    options = SourceOptions(
        path=settings.path.absolute(),
        kind=settings.kind,
        image_column=settings.image_column,
        caption_columns=settings.caption_columns,
        label_column=settings.label_column,
        split_column=settings.split_column,
        group_column=settings.group_column,
        json_captions=settings.json_captions,
        image_root=settings.image_root,
        delimiter=settings.delimiter,
        allow_outside=settings.allow_outside,
        max_unpacked_gib=settings.max_unpacked_gib,
        torchvision_class=settings.torchvision_class,
        merge_rows=True,
    )
    try:
        options, why = resolve(options)
    except ValueError as error:
        raise ValueError(str(error).replace("SOURCE: ", "--data: ", 1)) from None
    if options.kind == "packed":
        return options, why
    key = _digest([str(options.path), _read_as(options)])[:16]
    spool = settings.cache_dir.expanduser() / "sources" / key
    spool.mkdir(parents=True, exist_ok=True)
    return replace(options, spool=spool), why


def _read_as(options: SourceOptions) -> dict[str, object]:
    """Return all that a source's pictures depend on beside its files, wherever it lies."""
    others = ("path", "spool", "max_unpacked_gib")
    return {name: value for name, value in asdict(options).items() if name not in others}


def _packed_digest(options: SourceOptions) -> object:
    if options.kind != "packed":
        return None
    return read_manifest(options.path).digest


def _deal(
    listing: Listing, settings: SourceSettings
) -> tuple[dict[str, list[Numbered]], tuple[str, ...]]:
    """Return the rows by split; a source with labels and one split is dealt by the seed."""
    there = sorted({item.split for item in listing.items})
    has_labels = any(item.label >= 0 for item in listing.items)
    if len(there) != 1 or not has_labels or settings.split == there[0]:
        return number_items(listing, PlanSettings()), ()
    if settings.split is not None:
        raise ValueError(
            f"--split: expected {there[0]}, the only split of {settings.path}, got {settings.split}"
        )
    name = MEASURED[0] if there[0] != MEASURED[0] else MEASURED[1]
    shares = (settings.train_split, f"{name}={settings.share}")
    dealt = number_items(listing, PlanSettings(splits=shares, seed=settings.seed))
    said = (
        f"one split: {settings.share:g} of the pictures are measured on, drawn by seed "
        f"{settings.seed} group by group (--share, --seed)"
    )
    return dealt, (said,)


def _measured_name(numbered: dict[str, list[Numbered]], settings: SourceSettings) -> str:
    if settings.split is not None:
        if settings.split not in numbered:
            raise ValueError(
                f"--split: expected one of {', '.join(sorted(numbered))}, got {settings.split}"
            )
        return settings.split
    known = [name for name in MEASURED if name in numbered]
    others = [name for name in sorted(numbered) if name != settings.train_split]
    return (known or others or sorted(numbered))[0]


def _split(name: str, numbered: Sequence[Numbered]) -> Split:
    return Split(
        name=name,
        items=tuple(row.item for row in numbered),
        group=np.array([row.group_id for row in numbered], dtype=np.int64),
    )


def _expect_names(names: Sequence[str], settings: SourceSettings) -> None:
    if settings.classes and len(settings.classes) != len(names):
        raise ValueError(
            f"--class-names: expected a name for each of the {len(names)} classes of "
            f"{settings.path}, a line each in the order {_some(names)}; got {len(settings.classes)}"
        )


def _renamed(names: Sequence[str], given: Sequence[str]) -> str:
    pairs = [f"{name} -> {new}" for name, new in zip(names, given, strict=True)]
    return f"classes (--class-names): {_some(pairs)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")


def _first(refusals: Sequence[Refusal]) -> str:
    return f"; the first: {refusals[0].file}: {refusals[0].reason}" if refusals else ""


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
