"""A shard as a task: from a slice of the listing and settings alone to a tar and its record.

A task may be run again, by any process: it writes the same bytes, and renames them into place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, rows_dtype
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import ShardInfo
from m3i_fast.pipelines.dataset.pack import PackedShard, write_shard
from m3i_fast.pipelines.dataset.sample_table import ROW
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.packing.caption_ids import (
    LongCaptions,
    cached_tokenizer,
    caption_ids,
    column_ids,
)
from m3i_fast.pipelines.packing.conversion import convert
from m3i_fast.pipelines.packing.items import (
    Item,
    Reader,
    Refusal,
    Refused,
    SourceOptions,
    Stamp,
    check_listed,
    keyed,
    refusal_of,
)
from m3i_fast.pipelines.packing.output import STATE, Output
from m3i_fast.pipelines.packing.readers.guess import make_reader
from m3i_fast.pipelines.storage.requests import Stop


class Numbered(NamedTuple):
    """An item with its ids."""

    item: Item
    sample_id: int
    group_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What the bytes of a shard depend on beside its items."""

    num_merges: int | None
    context_length: int
    long_captions: LongCaptions
    max_pixels: int
    for_gpu: int | None
    columns: tuple[ColumnInfo, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return the settings for JSON, as before there were columns where there are none."""
        described = asdict(self)
        if not self.columns:
            del described["columns"]
        return described


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTask:
    """A shard that is to be written."""

    out: Output
    name: str
    items: tuple[Numbered, ...]
    source: SourceOptions
    files: Mapping[str, Stamp]  # as of `Listing`
    settings: ShardSettings

    @property
    def key(self) -> str:
        """Hash of all that the shard's bytes depend on."""
        items, numbers = [n.item for n in self.items], [n[1:] for n in self.items]
        content = [self.settings.described(), self.name, numbers]
        content += keyed(items, self.files, is_shared=self.out.is_shared)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def record_file(self) -> str:
        """Name of the record in DIR."""
        return f"{STATE}/{self.name}.json"

    def run(self, advance: Callable[[int], None]) -> Record:
        """Write the shard, as `run`."""
        return run(self, advance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What became of a task."""

    packed: PackedShard | None  # None: all of its pictures are refused
    refused: tuple[tuple[int, Refusal], ...]  # (sample id, why)
    changes: dict[str, int]  # pictures by why they were encoded again
    num_cut: int  # captions

    def to_json(self, key: str) -> bytes:
        """Return the record as it is kept until the data set is whole."""
        raw: dict[str, Any] = asdict(self) | {"key": key}
        if self.packed is not None:
            for name, rows in (("rows", self.packed.rows), ("columns", self.packed.columns)):
                text = None if rows is None else base64.b64encode(rows.tobytes()).decode()
                raw["packed"][name] = text
        return json.dumps(raw).encode()


def run(task: ShardTask, advance: Callable[[int], None]) -> Record:
    """Write the shard of a task and its record; `advance` is told the pictures that are done."""
    reader = opened_reader(task.source)
    tokenizer = cached_tokenizer(task.settings.num_merges, task.settings.context_length)
    refused: list[tuple[int, Refusal]] = []
    changes: Counter[str] = Counter()
    num_cut = 0

    def samples() -> Iterator[tuple[Sample, tuple[int, int]]]:
        nonlocal num_cut
        for numbered in task.items:
            try:
                sample, size, change, cut = _sample(
                    numbered, reader, tokenizer, task.settings, task.source.path
                )
            except Refused as reason:
                refused.append((numbered.sample_id, reason.of(numbered.item.name)))
            else:
                changes[change] += 1
                num_cut += cut
                yield sample, size
            advance(1)
        check_listed(reader.folder, task.files)

    packed = None
    good = samples()
    if (first := next(good, None)) is not None:
        with task.out.written(task.name) as new:
            packed = write_shard(new.path, task.name, chain([first], good), task.settings.columns)
            new.sha256 = packed.info.sha256
    else:
        task.out.remove(task.name)
    changes.pop("", None)
    record = Record(
        packed=packed,
        refused=tuple(refused),
        changes=dict(sorted(changes.items())),
        num_cut=num_cut,
    )
    task.out.write(task.record_file, record.to_json(task.key))
    return record


def finished(task: ShardTask, sizes: Mapping[str, int], stop: Stop) -> Record | None:
    """Return the record of a task that was run before, with the same items and settings.

    sizes: bytes of each file that the output has. stop: as of `Output.read`.
    """
    stored = task.out.read(task.record_file, stop) if task.record_file in sizes else None
    if stored is None:
        return None
    raw = json.loads(stored)
    if raw["key"] != task.key:
        return None
    packed = None
    if raw["packed"] is not None:
        fields = raw["packed"]
        info = ShardInfo(**fields["info"])
        fields["info"] = info
        fields["rows"] = np.frombuffer(base64.b64decode(fields["rows"]), ROW)
        if fields["columns"] is not None:
            dtype = rows_dtype(task.settings.columns)
            fields["columns"] = np.frombuffer(base64.b64decode(fields["columns"]), dtype)
        packed = PackedShard(**{k: _tuple(v) for k, v in fields.items()})
        if sizes.get(info.file) != info.num_bytes:
            return None
    return Record(
        packed=packed,
        refused=tuple((i, Refusal(*fields)) for i, fields in raw["refused"]),
        changes=raw["changes"],
        num_cut=raw["num_cut"],
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sample(
    numbered: Numbered,
    reader: Reader,
    tokenizer: Tokenizer,
    settings: ShardSettings,
    source: Path,
) -> tuple[Sample, tuple[int, int], str, int]:
    """Return a sample, its size, why its picture was changed, and how many captions were cut."""
    item = numbered.item
    captions, num_cut = caption_ids(tokenizer, item.captions, settings.long_captions)
    try:
        content = reader.read(item.place, item.stamp)
    except OSError as error:
        raise refusal_of(error, source) from None
    stored = convert(content, max_pixels=settings.max_pixels, for_gpu=settings.for_gpu)
    kinds = {column.name: column.kind for column in settings.columns}
    values, also_cut = column_ids(
        tokenizer, kinds, dict(item.columns), lambda: stored.given_size, settings.long_captions
    )
    sample = Sample(
        image=stored.content,
        extension=stored.extension,
        name=os.path.splitext(item.name)[0],
        sample_id=numbered.sample_id,
        group_id=numbered.group_id,
        captions=captions,
        label=item.label,
        columns=values,
    )
    return sample, stored.size, stored.change, num_cut + also_cut


@lru_cache(maxsize=4)
def opened_reader(options: SourceOptions) -> Reader:
    """Return the reader of a source, which is opened once in a process."""
    return make_reader(options)


def forget_sources() -> None:
    """Have sources opened anew, which may have changed since."""
    opened_reader.cache_clear()
