"""Named columns of a source: classes, labels, numbers, texts and regions beside class and captions.

A flag says what is packed, as NAME:KIND or NAME:KIND=COLUMN,COLUMN: without columns that of the
source which is called NAME; numbers may be of several. Regions may stand in a file beside the
pictures, NAME:regions=FILE.json, whatever the source is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast, get_args

from m3i_fast.config.columns import ColumnKind as Kind
from m3i_fast.pipelines.dataset.annotations.columns import MOST_VALUES, UNNAMED, ColumnInfo
from m3i_fast.pipelines.packing.items import Listing, Refused, SourceOptions, is_missing, printable
from m3i_fast.pipelines.packing.readers.labels import MOST_CLASSES
from m3i_fast.pipelines.packing.readers.regions import (
    is_regions_file,
    read_regions,
    regions_by_item,
)

SEPARATOR = ";"
"""What stands between the labels, or the numbers, of one cell of a text table."""
_MENDED = "mend the cell, or leave it empty"


class Spec(NamedTuple):
    """A named column as a flag has it."""

    name: str
    kind: Kind
    sources: tuple[str, ...]  # columns of the source

    @property
    def is_file(self) -> bool:
        """Return whether the column stands in a file of its own, and not in the source's rows."""
        return self.kind == "regions" and is_regions_file(self.sources[0])

    def of_row(self, row: Mapping[str, Any]) -> Any:
        """Return what a row of the source has: a value, or the list of several columns'."""
        if self.is_file:
            return None
        return row[self.sources[0]] if len(self.sources) == 1 else [row[s] for s in self.sources]


def specs_of(flags: Sequence[str]) -> list[Spec]:
    """Return the named columns that --column asks for; raises ValueError for one that is wrong."""
    specs = []
    for flag in flags:
        given, _, sources = flag.partition("=")
        name, _, kind = given.partition(":")
        if kind not in get_args(Kind):
            raise ValueError(
                f"--column: expected NAME:KIND or NAME:KIND=COLUMN with a kind of "
                f"{', '.join(get_args(Kind))}, got {flag!r}"
            )
        kind = cast(Kind, kind)
        ColumnInfo(name=name, kind=kind, names=() if kind in UNNAMED else ("0",))  # its name
        of = tuple(sources.split(",")) if sources else (name,)
        if len(of) > 1 and kind != "numbers":
            raise ValueError(
                f"--column: expected one column of the source for {kind}, got {flag!r}"
            )
        specs.append(Spec(name, kind, of))
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"--column: expected a name once, got {', '.join(names)}")
    return specs


def refuse_columns(options: SourceOptions) -> None:
    """Raise ValueError where columns other than regions' files are asked of a source without."""
    if not all(spec.is_file for spec in specs_of(options.columns)):
        raise ValueError(
            f"--column: expected a table or a Hugging Face data set, which have columns, or tars, "
            f"whose json has fields, got {options.kind}: write a table with the path of each "
            "picture; regions may stand in a file, NAME:regions=FILE.json"
        )


def expect_columns(specs: Sequence[Spec], names: Sequence[str], where: str) -> None:
    """Raise ValueError for a column that the source does not have."""
    for source in (source for spec in specs if not spec.is_file for source in spec.sources):
        if source not in names:
            raise ValueError(
                f"--column: expected one of {', '.join(names)} ({where}), got {source}"
            )


def assign_columns(
    listing: Listing,
    options: SourceOptions,
    raw: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Give each item of a listing its named columns, and refuse those that are none.

    raw: by an item's name, what its row has by column. known: names of classes or labels by column,
    where the source stores numbers of them.
    """
    specs = specs_of(options.columns)
    if not specs:
        return
    raw = _with_files(listing, options, specs, raw)
    read: list[dict[str, Any]] = []
    kept = []
    for item in listing.items:
        with listing.row(item.name):
            read.append({s.name: read_value(s, raw[item.name][s.name]) for s in specs})
            kept.append(item)
    described = describe(specs, read, known)
    listing.items = []
    for item, values in zip(kept, read, strict=True):
        with listing.row(item.name):
            of_item = tuple((d.column.name, d.row_of(values[d.column.name])) for d in described)
            listing.items.append(item._replace(columns=of_item))
    listing.columns = tuple(each.column for each in described)
    listing.notes.append(f"named columns: {told(listing.columns)} (--column)")


def told(columns: Sequence[ColumnInfo]) -> str:
    """Name columns, with their kind and the number of their values' names."""
    return ", ".join(f"{c.name} {c.kind} of {len(c.names)}" if c.names else c.name for c in columns)


def _with_files(
    listing: Listing,
    options: SourceOptions,
    specs: Sequence[Spec],
    raw: Mapping[str, Mapping[str, Any]],
) -> Mapping[str, Mapping[str, Any]]:
    """Return what the items' rows have, with what stands in files beside the source's pictures."""
    folder = options.path.parent if options.path.is_file() else options.path
    files = {s.name: folder / s.sources[0] for s in specs if s.is_file}
    if not files:
        return raw
    read = {name: regions_by_item(file, listing) for name, file in files.items()}
    return {
        item.name: {
            **raw.get(item.name, {}),
            **{name: found.get(item.name) for name, found in read.items()},
        }
        for item in listing.items
    }


def read_value(spec: Spec, value: Any) -> Any:
    """Return a cell: text of a class, texts of labels, floats, text, regions or None.

    Raises Refused.
    """
    if spec.kind == "regions":
        where = f"{spec.name} of {spec.sources[0]}" if spec.is_file else spec.name
        return read_regions(where, value)
    if spec.kind in ("class", "text"):
        if value is None or is_missing(value) or not str(value).strip():
            return None
        if isinstance(value, (list, dict, bytes)) or (
            spec.kind == "text" and not isinstance(value, str)
        ):
            raise Refused(f"{spec.name}: expected text, got {type(value).__name__}", _MENDED)
        return _text(value)
    cells = _cells(spec, value)
    if cells is None:
        return None
    if len(cells) > MOST_VALUES:
        raise Refused(
            f"{spec.name}: expected at most {MOST_VALUES} values, got {len(cells)}", _MENDED
        )
    if spec.kind == "labels":
        if any(isinstance(cell, (list, dict, bytes)) for cell in cells):
            raise Refused(f"{spec.name}: expected texts, got lists of them", _MENDED)
        there = [_text(cell) for cell in cells if cell is not None and not is_missing(cell)]
        return list(dict.fromkeys(text for text in there if text))
    return [_number(spec, cell) for cell in cells]


def _text(value: Any) -> str:
    """Return a name as text: whole numbers without a point, as tables with gaps have them."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _cells(spec: Spec, value: Any) -> list[Any] | None:
    if isinstance(value, str):
        if not (text := value.strip()):
            return None
        if text.startswith("["):
            try:
                return list(json.loads(text))
            except (ValueError, RecursionError) as error:
                raise Refused(f"{spec.name}: not a list of JSON: {error}", _MENDED) from None
        return text.split(SEPARATOR)
    if value is None or is_missing(value):
        return None
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _number(spec: Spec, cell: Any) -> float | None:
    if cell is None or is_missing(cell) or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        number = float(cell)
    except (TypeError, ValueError):
        raise Refused(
            f"{spec.name}: expected a number, got {printable(str(cell)[:40])!r}", _MENDED
        ) from None
    if math.isnan(number):
        return None
    if not abs(number) <= 3.4e38:  # of fp32
        raise Refused(f"{spec.name}: expected a number of fp32, got {number}", _MENDED)
    return number


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """A named column, and what the values that `read_value` returns become in it."""

    column: ColumnInfo
    places: Mapping[str, int] | None
    """Index by name of a class or label; None: the source has indices."""
    none: str | None
    """The class or label that stands for none; None: there is no such."""

    def row_of(self, value: Any) -> Any:
        """Return a value as `ColumnInfo.row` takes it; of a text and of regions what was read.

        Raises Refused for numbers of another count, and for an index that has no name.
        """
        column = self.column
        if value is None or column.kind in UNNAMED:
            return value
        if column.kind == "numbers":
            if len(value) != column.size:
                raise Refused(
                    f"{column.name}: expected {column.size} numbers, got {len(value)}", _MENDED
                )
            return value
        texts = [text for text in _list(value) if text != self.none]
        if self.places is None:
            indices = [int(text) for text in texts]
        else:
            indices = [self.places[printable(text)] for text in texts]
        if any(not 0 <= index < len(column.names) for index in indices):
            raise Refused(
                f"{column.name}: expected indices from 0 to {len(column.names) - 1}, got {indices}",
                _MENDED,
            )
        if column.kind == "labels":
            return indices
        return indices[0] if indices else None


def describe(
    specs: Sequence[Spec],
    rows: Iterable[Mapping[str, Any]],
    known: Mapping[str, Sequence[str]] | None = None,
) -> list[Described]:
    """Return the columns of all rows; ValueError where nothing is known of one in any row.

    rows: of each sample by the column's name what `read_value` returned; gone through once. known:
    names of classes or labels by column, where the source stores numbers of them, -1 for none. Else
    -1 is none where all other classes or labels are indices.
    """
    seen = [(spec, _Seen()) for spec in specs]
    for values in rows:
        for spec, column in seen:
            column.add(spec, values.get(spec.name))
    return [_described(spec, column, (known or {}).get(spec.name, ())) for spec, column in seen]


@dataclass(slots=True)
class _Seen:
    """What the values of a column were."""

    texts: set[str] = field(default_factory=set)
    """Of classes and labels."""
    most: int | None = None
    """Cells of a value; None: no value was there."""
    most_named: int | None = None
    """The same without cells that are "-1"."""

    def add(self, spec: Spec, value: Any) -> None:
        if value is None:
            return
        cells = _list(value)
        named = [cell for cell in cells if cell != "-1"]
        if spec.kind in ("class", "labels"):
            self.texts.update(cells)
        self.most = max(self.most or 0, len(cells))
        if named or spec.kind != "class":
            self.most_named = max(self.most_named or 0, len(named))


def _described(spec: Spec, seen: _Seen, known: Sequence[str]) -> Described:
    is_named = spec.kind in ("class", "labels")
    none = "-1" if is_named and (known or _are_indices(seen.texts - {"-1"})) else None
    most = seen.most if known or none is None else seen.most_named
    if most is None:
        raise ValueError(f"--column: expected a picture with {spec.name}, got none")
    names = tuple(known)
    if spec.kind == "numbers":
        most = len(spec.sources) if len(spec.sources) > 1 else most
        names = spec.sources if len(spec.sources) == most else _places(spec.sources[0], most)
    if is_named and not known:
        names = tuple(_names(seen.texts - {none or ""}, spec.name))
        if not names:
            raise ValueError(f"--column: expected a picture with a label in {spec.name}, got none")
    size = max(most, 1) if spec.kind != "text" else 1  # of a text the tokenizer knows it
    column = ColumnInfo(name=spec.name, kind=spec.kind, names=names, size=size)
    places = None if known else {name: place for place, name in enumerate(names)}
    return Described(column=column, places=places, none=none)


def _are_indices(found: set[str]) -> bool:
    return all(text.isascii() and text.isdecimal() for text in found)


def _places(source: str, count: int) -> tuple[str, ...]:
    return tuple(f"{source}_{place}" for place in range(count))


def _names(found: set[str], name: str) -> Iterator[str]:
    """Yield the names of classes: sorted, or of indices all up to the largest."""
    if not _are_indices(found):
        yield from (printable(text) for text in sorted(found))
        return
    most = max((int(text) for text in found if len(text) < 10), default=-1)
    if len(max(found, key=len, default="")) >= 10 or most >= MOST_CLASSES:
        raise ValueError(f"--column: expected indices below {MOST_CLASSES} in {name}")
    yield from map(str, range(most + 1))


def with_context(columns: Sequence[ColumnInfo], context_length: int) -> tuple[ColumnInfo, ...]:
    """Return columns with the room for texts that the tokenizer gives."""
    return tuple(
        replace(column, size=context_length) if column.kind == "text" else column
        for column in columns
    )
