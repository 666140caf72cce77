"""A data set that Hugging Face's library saved to disk (`save_to_disk`), with all its splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.packing.items import (
    UNKNOWN,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    check_inside,
    check_num_bytes,
    clean_captions,
    group_of,
    is_missing,
    printable,
    read_picture,
    split_of_cell,
    stamp,
)
from m3i_fast.pipelines.packing.readers.columns import Columns, choose_columns, kind_of_type
from m3i_fast.pipelines.packing.readers.labels import assign_labels, named_label
from m3i_fast.pipelines.packing.readers.named_columns import Spec, assign_columns, specs_of

MARKS = ("dataset_dict.json", "dataset_info.json")  # that such a folder holds


class HuggingFace:
    """Reader of such a data set; its Arrow files are memory-mapped, so any row is read directly."""

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.folder = options, options.path

    @cached_property
    def _splits(self) -> dict[str, Any]:
        datasets = require("datasets", extra="sources")
        try:
            found = datasets.load_from_disk(str(self.options.path))
        except Exception as error:  # of a damaged folder, of a dozen types
            raise ValueError(f"{self.options.path}: {error}") from error
        splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        first = next(iter(splits.values()))
        self.columns = choose_columns(
            first.column_names,
            self.options,
            self.options.path.name,
            partial(kind_of_type, first.features.arrow_schema),
        )
        image = self.columns.image
        for name, split in splits.items():
            if isinstance(split.features.get(image), datasets.Image):
                splits[name] = split.cast_column(image, datasets.Image(decode=False))
        return splits

    def list(self) -> Listing:
        listing = Listing()
        for file in sorted(self.options.path.rglob("*.arrow")):
            listing.files[file.relative_to(self.options.path).as_posix()] = stamp(file)
        splits, columns = self._splits, self.columns
        listing.notes.append(columns.said())
        labels: list[object] = []
        names: tuple[str, ...] = self.options.class_names
        specs, named = specs_of(self.options.columns), dict[str, dict[str, Any]]()
        known_of: dict[str, tuple[str, ...]] = {}
        for split, rows in splits.items():
            known = getattr(rows.features.get(columns.label or ""), "names", None)
            names = names or tuple(known or ())
            known_of |= {s.name: found for s in specs if (found := _class_names(rows, s))}
            paths = _paths(rows, columns.image)
            annotations = _annotations(rows, columns, specs)
            for number, path in enumerate(paths):
                with listing.row(f"{split}[{number}]"):
                    row = annotations[number]
                    item = _item(row, columns, split, number)
                    if path is not None:
                        item = item._replace(stamp=self._stamp(path))
                    labels.append(named_label(row.get(columns.label or ""), known))
                    listing.items.append(item)
                    named[item.name] = {s.name: s.of_row(row) for s in specs}
        assign_labels(listing, labels, class_names=names, label_as=self.options.label_as)
        assign_columns(listing, self.options, named, known_of)
        return listing

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        split, row = str(place[0]), int(place[1])
        picture = self._splits[split][row][self.columns.image]
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, bytes):
            check_num_bytes(len(picture))
            return picture
        if not isinstance(picture, str):
            raise Refused(
                f"expected a picture, got {type(picture).__name__}", "name it by --image-column"
            )
        return read_picture(self._inside(picture), listed)

    def _inside(self, picture: str) -> Path:
        """Return where a picture's file lies; Refused outside of the folder."""
        path = self.options.path / picture
        if not self.options.allow_outside:
            check_inside(path, self.options.path.resolve())
        return path

    def _stamp(self, picture: str) -> Stamp:
        try:
            return stamp(self._inside(picture))
        except OSError as error:
            raise Refused(
                f"{printable(picture)}: cannot be read: {error.strerror}",
                "put the file there, or save the data set with its pictures in it",
            ) from None


def _paths(rows: Any, image: str) -> Iterator[str | None]:
    """Yield the file of each row's picture, None where the data set holds its bytes.

    Of a picture's bytes Arrow reads whether they are there, and nothing else.
    """
    rows = rows.select_columns([image]).flatten()
    names = {name.removeprefix(image) for name in rows.column_names}
    for table in rows.with_format("arrow").iter(batch_size=1024):
        if names == {".bytes", ".path"}:
            held = table[f"{image}.bytes"].is_valid().to_pylist()
            paths = table[f"{image}.path"].to_pylist()
            yield from (None if has else path for has, path in zip(held, paths, strict=True))
        elif names == {""} and str(table.schema.field(image).type) in ("string", "large_string"):
            yield from table[image].to_pylist()
        else:
            yield from [None] * len(table)


def _class_names(rows: Any, spec: Spec) -> tuple[str, ...]:
    """Return the names of a column's classes or labels, where the data set stores numbers."""
    feature = rows.features.get(spec.sources[0])
    feature = getattr(feature, "feature", feature)  # of a list
    return tuple(getattr(feature, "names", None) or ())


def _annotations(rows: Any, columns: Columns, specs: Sequence[Spec]) -> Any:
    """Return the rows of a split, by number, without their pictures."""
    wanted = [*columns.captions, columns.label, columns.group, columns.split]
    wanted += [source for spec in specs if not spec.is_file for source in spec.sources]
    kept = list(dict.fromkeys(name for name in wanted if name is not None))
    if not kept:
        return [{}] * len(rows)
    return rows.select_columns(kept)


def _item(row: dict[str, Any], columns: Columns, split: str, number: int) -> Item:
    captions: list[object] = []
    for name in columns.captions:
        value = row[name]
        captions += value if isinstance(value, list) else [value]
    own = row[columns.split] if columns.split else None
    chosen = split if is_missing(own) else str(own or split)
    return Item(
        name=f"{split}[{number}]",
        place=(split, number),
        split=split_of_cell(chosen),
        captions=clean_captions(captions),
        group=group_of(row[columns.group] if columns.group else None),
    )


def is_saved(path: Path) -> bool:
    """Return whether a folder is such a data set."""
    return any((path / name).is_file() for name in MARKS)
