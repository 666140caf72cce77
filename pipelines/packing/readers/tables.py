"""Pictures named, or held, by a table: CSV, TSV, lines of JSON or Parquet, a row a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from m3i_fast.durable_files import expect_unpacked
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.packing.items import (
    UNKNOWN,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    check_files,
    check_inside,
    clean_captions,
    group_of,
    is_missing,
    printable,
    read_picture,
    refusal_of,
    split_in_name,
    split_of_cell,
    stamp,
)
from m3i_fast.pipelines.packing.readers.columns import (
    NOT_FETCHED,
    Columns,
    choose_columns,
    kind_of_cells,
    kind_of_type,
)
from m3i_fast.pipelines.packing.readers.labels import assign_labels, named_label
from m3i_fast.pipelines.packing.readers.named_columns import assign_columns, specs_of
from m3i_fast.pipelines.packing.readers.spool import Spool, open_spool, read_spooled

TEXT_SUFFIXES = (".csv", ".tsv")
MAX_TABLE_BYTES = 1 << 33
MOST_CELL = 1 << 17  # characters of a text table
LOOKED_AT = 1 << 20  # characters of a table, to tell captions from numbers
LOOKED_AT_LINES = 1000
BOM = b"\xef\xbb\xbf"  # that some editors write first
LINES_OF_JSON = ".jsonl"
Row = Mapping[str, Any]


class Opened(NamedTuple):
    """A table: its columns, (line or number from 1, row) of each, and names of classes it keeps."""

    columns: Columns
    rows: Iterator[tuple[int, Row]]
    class_names: tuple[str, ...] = ()


def table_files(path: Path) -> list[Path]:
    """Return the file, or the Parquet files of a folder in the order of their names."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*.parquet") if not p.is_dir())


class Tables:
    """Reader of a table's pictures."""

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self.files = table_files(options.path)
        self.folder = options.path.parent if options.path.is_file() else options.path
        self.root = (options.image_root or self.folder).absolute()

    def list(self) -> Listing:
        listing = Listing()
        labels: dict[str, object] = {}
        specs, named = specs_of(self.options.columns), dict[str, dict[str, Any]]()
        place_of: dict[str, int] = {}
        num_merged = 0
        class_names = self.options.class_names
        files = check_files(self.files, self.options, listing)
        with _LazySpool(self.options, dict(listing.files)) as spool:
            for raw_name, file in files.items():
                name = printable(raw_name)
                split = split_in_name(name) if len(self.files) > 1 else None
                columns, rows, known = self._open(file, name, listing)
                class_names = class_names or known
                listing.notes.append(f"{name}: {columns.said()}")
                start = spool.size
                for number, row in rows:
                    where = f"{name}:{number}"
                    with listing.row(where):
                        item = self._item(row, columns, where, spool)
                        item = item._replace(split=item.split or split or "train")
                        label = row[columns.label] if columns.label else None
                        label = None if is_missing(label) else named_label(label, known or None)
                        if labels.get(item.name, label) != label and self.options.merge_rows:
                            raise Refused(
                                f"{item.name}: label {label!r}, and {labels[item.name]!r} before",
                                "give rows of one picture one label",
                            )
                        num_merged += self._add(listing, item, place_of)
                        labels.setdefault(item.name, label)
                        named.setdefault(item.name, {s.name: s.of_row(row) for s in specs})
                    expect_unpacked(file, spool.size - start, self.options.max_unpacked_gib)
        if num_merged:
            listing.notes.append(
                f"{num_merged} rows name a picture of an earlier row, and add their captions to it"
            )
        assign_labels(
            listing,
            [labels[item.name] for item in listing.items],
            class_names=class_names,
            label_as=self.options.label_as,
        )
        assign_columns(listing, self.options, named)
        return listing

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        if len(place) == 1:  # the path of a file, which may be called as the spool is
            return read_picture(self.root / str(place[0]), listed)
        return read_spooled(self.options, place)

    def _open(self, file: Path, name: str, listing: Listing) -> Opened:
        suffix = file.suffix.lower()
        if suffix == LINES_OF_JSON:
            return open_json_lines(file, self.options, listing)
        if suffix in TEXT_SUFFIXES or self.options.delimiter is not None:
            return open_text(file, self.options, listing)
        return open_parquet(file, name, self.options, listing)

    def _item(self, row: Row, columns: Columns, where: str, spool: _LazySpool) -> Item:
        captions = []
        for column in columns.captions:
            value = row[column]
            captions += value if isinstance(value, list) else [value]
        split = row[columns.split] if columns.split else None
        item = Item(
            name=where,
            place=(),
            captions=clean_captions(captions),
            group=group_of(row[columns.group] if columns.group else None),
            split="" if is_missing(split) else split_of_cell(str(split)),
        )
        picture = row[columns.image]
        if isinstance(picture, dict):  # as the datasets library stores an image
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, bytes):
            return item._replace(place=spool.get().append(picture))
        if not isinstance(picture, str) or not picture.strip():
            raise Refused("expected the path of a picture, got none", "fill it in, or drop the row")
        return self._file_item(item, picture.strip())

    def _file_item(self, item: Item, named: str) -> Item:
        """Return the item of a picture that is a file."""
        if "\0" in named:
            raise Refused("a path with a zero byte", "write the table again")
        if "://" in named:
            raise Refused(f"{printable(named)}: a URL, and no path of a picture", NOT_FETCHED)
        named = os.path.normpath(named)
        path = self.root / named
        try:
            if not self.options.allow_outside:
                check_inside(path, self.root.resolve())
            return item._replace(name=printable(named), place=(named,), stamp=stamp(path))
        except OSError as error:
            advice = "name files relative to the table's folder, or that folder by --image-root"
            if "\\" in named:
                advice = "write paths with / in place of \\"
            raise Refused(f"{printable(named)}: {refusal_of(error).reason}", advice) from None

    def _add(self, listing: Listing, item: Item, place_of: dict[str, int]) -> bool:
        """Add an item, or its captions to that of an earlier row of the same picture, if any."""
        if item.name not in place_of:
            place_of[item.name] = len(listing.items)
            listing.items.append(item)
            return False
        if not self.options.merge_rows:
            raise Refused(
                f"{item.name}: named by an earlier row",
                "drop the row, or say --merge-rows where rows have a caption each of one picture",
            )
        place = place_of[item.name]
        earlier = listing.items[place]
        captions = clean_captions(tuple(dict.fromkeys(earlier.captions + item.captions)))
        listing.items[place] = earlier._replace(captions=captions)
        return True


class _LazySpool:
    """A spool that is made where a table holds pictures, not names of files."""

    def __init__(self, options: SourceOptions, stamps: Mapping[str, Stamp]) -> None:
        self.options, self.stamps = options, stamps
        self.made: Spool | None = None

    @property
    def size(self) -> int:
        """Bytes of the pictures in it."""
        return self.made.size if self.made else 0

    def get(self) -> Spool:
        if self.made is None:
            self.made = open_spool(self.options, self.stamps)
        return self.made

    def __enter__(self) -> _LazySpool:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.made is not None:
            self.made.__exit__(*error)


# ---- CSV and TSV ---------------------------------------------------------------------------------


def open_text(file: Path, options: SourceOptions, listing: Listing) -> Opened:
    """Open a table of text; bad rows are refused.

    Raises ValueError where it is no such table, naming the line.
    """
    _check_size(file)
    # A byte that is not UTF-8 becomes a lone surrogate, which the check of its row finds.
    text = file.read_bytes().decode("utf-8-sig", "surrogateescape")
    first = text.split("\n", 1)[0]
    delimiter = options.delimiter or ("\t" if file.suffix.lower() == ".tsv" else _delimiter(first))
    if delimiter != ",":
        listing.notes.append(f"{printable(file.name)}: cells end with {delimiter!r} (--delimiter)")
    rows = _reader(text, delimiter)
    header = next(_checked(rows, file), [])
    if len(set(header)) < len(header):
        raise ValueError(f"{file}: expected a name once in its first line, got {', '.join(header)}")
    columns = choose_columns(
        header, options, file.name, lambda name: _kind_of(text, delimiter, header.index(name))
    )
    return Opened(columns, _text_rows(_checked(rows, file), rows, header, file, listing))


def _check_size(file: Path) -> None:
    if file.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(
            f"{file}: expected at most {MAX_TABLE_BYTES} bytes; split it, or take Parquet"
        )


def _reader(text: str, delimiter: str) -> Any:
    """Return a reader of rows of cells; only in a table of tabs quotation marks are text."""
    csv.field_size_limit(MAX_TABLE_BYTES)  # `_text_rows` refuses the row of a long cell
    file = io.StringIO(text, newline="")
    if delimiter == "\t":  # as in files of web captions
        return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(file, delimiter=delimiter, strict=True)


def _kind_of(text: str, delimiter: str, column: int) -> str:
    """Return what the first cells of a column hold, those without a text aside."""
    cells = []
    with suppress(csv.Error):  # of a row in which the part that is looked at ends
        for row in islice(_reader(text[:LOOKED_AT], delimiter), 1, None):
            cells += [cell for cell in row[column : column + 1] if cell.strip()]
    return kind_of_cells(cells)


def _delimiter(first: str) -> str:
    """Return what ends a cell of the first line of a .csv."""
    return next((c for c in ",;|\t" if c in first), ",")


def _checked(rows: Any, file: Path) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise ValueError(
            f"{file}: line {rows.line_num}: {error}: a quotation mark that is not closed, or not "
            'doubled ("")'
        ) from None


def _text_rows(
    cells_of_rows: Iterator[list[str]], reader: Any, header: list[str], file: Path, listing: Listing
) -> Iterator[tuple[int, Row]]:
    for cells in cells_of_rows:
        if not any(cells):
            continue
        where = f"{printable(file.name)}:{reader.line_num}"
        if len(cells) != len(header):
            listing.refuse(
                where,
                f"expected {len(header)} cells, got {len(cells)}",
                "put cells that hold the delimiter in quotation marks",
            )
        elif (longest := max(map(len, cells))) > MOST_CELL:
            reason = f"expected cells of at most {MOST_CELL} characters, got {longest}"
            listing.refuse(where, reason, "shorten the text")
        else:
            yield reader.line_num, dict(zip(header, cells, strict=True))


# ---- Lines of JSON -------------------------------------------------------------------------------


def open_json_lines(file: Path, options: SourceOptions, listing: Listing) -> Opened:
    """Open a file with an object of JSON on each line, as metadata.jsonl beside pictures.

    Its columns are the fields of any line; lines that are no object are refused. Raises ValueError
    where none is.
    """
    _check_size(file)
    rows: list[tuple[int, dict[str, Any]]] = []
    header: dict[str, None] = {}
    for number, line in enumerate(file.read_bytes().removeprefix(BOM).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            where = f"{printable(file.name)}:{number}"
            listing.refuse(where, f"json: {error}", "write an object of JSON on each line")
            continue
        rows.append((number, row))
        header |= dict.fromkeys(row)

    def kind_of(name: str) -> str:
        cells = [row[name] for _, row in rows[:LOOKED_AT_LINES] if row.get(name) is not None]
        return kind_of_cells(cells)

    columns = choose_columns([*header], options, file.name, kind_of)
    return Opened(columns, ((number, dict.fromkeys(header) | row) for number, row in rows))


# ---- Parquet -------------------------------------------------------------------------------------


def open_parquet(file: Path, name: str, options: SourceOptions, listing: Listing) -> Opened:
    """Open a Parquet file; ValueError where it is none."""
    parquet = require("pyarrow.parquet", extra="sources")
    arrow = require("pyarrow")
    try:
        opened = parquet.ParquetFile(file, page_checksum_verification=True)
    except (arrow.ArrowException, OSError) as error:
        kinds = ", ".join((*TEXT_SUFFIXES, LINES_OF_JSON))
        raise ValueError(
            f"{file}: not a Parquet file: {error}; a table of text is called {kinds}"
        ) from None
    groups = map(opened.metadata.row_group, range(opened.num_row_groups))
    num_bytes = sum(group.total_byte_size for group in groups)
    expect_unpacked(file, num_bytes, options.max_unpacked_gib)
    schema = opened.schema_arrow
    columns = choose_columns(schema.names, options, file.name, partial(kind_of_type, schema))
    needed = [columns.image, *columns.captions]
    needed += [c for c in (columns.label, columns.group, columns.split) if c is not None]
    needed += [source for spec in specs_of(options.columns) for source in spec.sources]
    names = _class_names(schema.metadata or {}, columns.label)
    return Opened(columns, _parquet_rows(opened, needed, name, arrow, listing), names)


def _class_names(metadata: Mapping[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """Return the names of the classes that the datasets library keeps with a column of numbers."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        names = features[label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _parquet_rows(
    opened: Any, needed: list[str], name: str, arrow: Any, listing: Listing
) -> Iterator[tuple[int, Row]]:
    number = 0
    try:
        for batch in opened.iter_batches(batch_size=64, columns=list(dict.fromkeys(needed))):
            for place in range(len(batch)):
                number += 1
                with listing.row(f"{name}:{number}"):  # by itself: a cell may raise
                    (row,) = batch.slice(place, 1).to_pylist()
                    yield number, row
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{name}: after row {number}: {error}") from None
