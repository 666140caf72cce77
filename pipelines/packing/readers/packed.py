"""A data set that this package has packed or indexed, read as a source, caption by caption."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3i_fast.pipelines.dataset.annotations.captions import LENGTHS, TOKENS
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import Manifest, read_manifest
from m3i_fast.pipelines.dataset.pictures import FORMATS
from m3i_fast.pipelines.dataset.sample_table import (
    BAD,
    NO_CRC,
    SampleTable,
    checksum,
)
from m3i_fast.pipelines.packing.items import (
    UNKNOWN,
    Item,
    Listing,
    Place,
    Refused,
    SourceOptions,
    Stamp,
    stamp,
)
from m3i_fast.pipelines.packing.readers.regions import SHARES
from m3i_fast.pipelines.tar_members import Range, sample_files, sample_parts

MAX_OPEN = 64
"""Shards that a process holds open."""
_MEND = "see what is wrong by: m3i-fast data verify DIR"


class _Row(NamedTuple):
    """Where a sample lies."""

    shard: int
    offset: int
    size: int
    crc32c: int | None


class Packed:
    """Reader of a dataset directory whose shards lie in a folder.

    Captions that are stored as token ids are decoded: in lower case, and cut where they were cut.
    """

    def __init__(self, options: SourceOptions) -> None:
        self.options = options
        self._files: OrderedDict[Path, int] = OrderedDict()  # descriptors, the last used last

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        while self._files:  # also where Python ends, and modules are none
            close(self._files.popitem()[1])

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest of the directory."""
        return read_manifest(self.options.path)

    @property
    def folder(self) -> Path:
        """The folder of its shards."""
        return self.manifest.shards_of(self.options.path)

    @cached_property
    def _tables(self) -> dict[str, SampleTable]:
        path = self.options.path
        self.manifest.shards_of(path)  # refuses those in a bucket
        return {name: SampleTable.open(path, self.manifest, name) for name in self.manifest.splits}

    def list(self) -> Listing:
        """List the samples of all splits, without those that are marked as bad."""
        listing = Listing(class_names=self.manifest.class_names, columns=self.manifest.columns)
        listing.notes.append(
            "captions, classes, groups and named columns as its manifest and tables have them, "
            "captions in lower case; --kind tars reads the files of its tars anew"
        )
        captions = self._captions_of()
        for split, table in self._tables.items():
            open_split(self.options.path, split)
            info = self.manifest.splits[split]
            for shard, file in zip(info.shards, table.shard_files, strict=True):
                listing.files[shard.file] = stamp(self.options.path / file)
            if info.max_alternates:
                listing.notes.append(f"{split}: the other pictures of its samples are left out")
            kept = np.flatnonzero((np.asarray(table.rows)["flags"] & BAD) == 0)
            if len(kept) < len(table):
                listing.notes.append(f"{split}: {len(table) - len(kept)} samples are marked as bad")
            for number in kept.tolist():
                row = table.rows[number]
                name = f"{split}/{int(row['sample_id'])}"
                try:
                    key, found = captions(split, number)
                except ValueError as error:
                    if isinstance(error.__cause__, OSError):  # says nothing of the sample
                        raise error.__cause__ from None
                    listing.refuse(name, f"captions: {error}", _MEND)
                    continue
                listing.items.append(
                    Item(
                        name=f"{split}/{key}",
                        place=(split, number),
                        split=split,
                        captions=found,
                        label=int(row["label"]),
                        group=str(int(row["group_id"])),
                        columns=self._columns(table, number),
                    )
                )
        return listing

    def _columns(self, table: SampleTable, number: int) -> tuple[tuple[str, Any], ...]:
        """Return a sample's named columns as an item has them; texts are decoded."""
        if table.columns is None:
            return ()
        rows = table.columns.rows[number]
        values = ((column, column.value(rows[column.name])) for column in table.columns.columns)
        return tuple((column.name, self._decoded(column, value)) for column, value in values)

    def _decoded(self, column: ColumnInfo, value: Any) -> Any:
        """Return a value with the texts of its token ids."""
        if column.kind == "regions" and value:
            return [[SHARES, box, self._tokenizer.decode(ids)] for box, ids in value]
        return self._tokenizer.decode(value) if column.kind == "text" and value else value

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_info(self.manifest.tokenizer)

    def read(self, place: Place, listed: Stamp = UNKNOWN) -> bytes:
        """Read the picture of a sample, whose bytes are compared with their checksum."""
        row = self._row(str(place[0]), int(place[1]))
        content = self._pread(str(place[0]), row)(row.size, 0)
        if row.crc32c is not None and checksum(content) != row.crc32c:
            raise Refused("the bytes differ from their checksum", _MEND)
        try:
            _, files = sample_files(content)
        except ValueError as error:
            raise Refused(str(error), _MEND) from None
        pictures = [files[extension] for extension in files if extension in FORMATS]
        if len(pictures) != 1:
            raise Refused(f"expected one picture, got {len(pictures)}", _MEND)
        return pictures[0]

    def _captions_of(self) -> Callable[[str, int], tuple[str, tuple[str, ...]]]:
        """Return a function (split, number) -> (key of the sample, its captions)."""
        member, _, field = self.manifest.caption_member.partition(":")
        has_captions = any(split.num_captions for split in self.manifest.splits.values())
        tokenizer = None
        if member == TOKENS and has_captions:
            tokenizer = Tokenizer.from_info(self.manifest.tokenizer)

        def captions(split: str, number: int) -> tuple[str, tuple[str, ...]]:
            row = self._row(split, number)
            pread = self._pread(split, row)
            key, parts = sample_parts(Range(pread, 0, row.size), row.size)
            wanted = {member, LENGTHS} if has_captions else set()
            stored = {p.extension: pread(p.size, p.offset) for p in parts if p.extension in wanted}
            if tokenizer is not None:
                return key, tuple(_decoded(stored, tokenizer))
            text = stored.get(member, b"").decode()
            if text and field:
                text = of_json(text, field)
            return key, (text.strip(),) if text.strip() else ()

        return captions

    def _row(self, split: str, number: int) -> _Row:
        row = self._tables[split].rows[number]
        known = None if row["flags"] & NO_CRC else int(row["crc32c"])
        return _Row(int(row["shard"]), int(row["offset"]), int(row["size"]), known)

    def _pread(self, split: str, row: _Row) -> Callable[[int, int], bytes]:
        """Return a function (count, offset in the sample) -> bytes."""
        file = self.options.path / self._tables[split].shard_files[row.shard]
        if file not in self._files:
            if len(self._files) == MAX_OPEN:
                os.close(self._files.popitem(last=False)[1])
            self._files[file] = os.open(file, os.O_RDONLY)
        self._files.move_to_end(file)
        descriptor = self._files[file]  # a forked worker's as well: pread moves no place in a file
        return lambda count, offset: os.pread(descriptor, count, row.offset + offset)


def of_json(text: str, field: str) -> str:
    """Return the caption in a field of a JSON object; empty where there is none."""
    content = json.loads(text)
    caption = content.get(field) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(caption, (str, type(None))):
        raise Refused(
            f"expected a JSON object with text as {field}, got {type(caption).__name__}", _MEND
        )
    return caption or ""


def _decoded(stored: dict[str, bytes], tokenizer: Tokenizer) -> Iterator[str]:
    ids = np.frombuffer(stored.get(TOKENS, b""), "<i4")
    ends = np.cumsum(np.frombuffer(stored[LENGTHS], "<i4")) if LENGTHS in stored else [len(ids)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        if text := tokenizer.decode(ids[start:end]):
            yield text
