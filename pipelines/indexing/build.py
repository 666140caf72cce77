"""An index of a folder of tars: tables and a manifest, so that it is a dataset directory."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from m3i_fast.durable_files import sync, write_atomically
from m3i_fast.pipelines.dataset.annotations.columns import COLUMNS_SUFFIX
from m3i_fast.pipelines.dataset.manifest import (
    INDEXED,
    MANIFEST_NAME,
    REFUSED_NAME,
    TABLE_SUFFIX,
    TOKENS_MEMBER,
    Manifest,
    ShardInfo,
    SplitInfo,
    TableInfo,
    is_dataset,
    read_manifest,
)
from m3i_fast.pipelines.dataset.sample_table import BAD, Rows, write_table
from m3i_fast.pipelines.indexing.contents import NO_GROUP, Columns
from m3i_fast.pipelines.indexing.named_columns import with_columns
from m3i_fast.pipelines.indexing.tar_places import COPY, Tars
from m3i_fast.pipelines.indexing.tar_task import TarIndex, TarTask, read_result, run
from m3i_fast.pipelines.packing.output import locked
from m3i_fast.pipelines.packing.workers import follow_parent

RESULTS = ".indexing"  # folder of what is finished, while an index is not
# What a killed index leaves half written; other hidden files are the user's.
LEFT = (
    f".{MANIFEST_NAME}.tmp-*",
    f".{REFUSED_NAME}.tmp-*",
    f".*{TABLE_SUFFIX}.*.writing",
    ".*.index.tmp-*",
    f".*{COPY}",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexInfo:
    """The entries of a manifest that are not found in the tars."""

    name: str
    licence: str
    attribution: str


class Advance(Protocol):
    def __call__(self, num_samples: int, num_bytes: int) -> object: ...


@dataclass(slots=True)
class Indexed:
    """What an index holds, and what it left out."""

    manifest: Manifest
    reasons: Counter[str] = field(default_factory=Counter)  # of refused samples and tars
    empty_splits: tuple[str, ...] = ()  # left out, since no sample of theirs can be used


def check_out(out: Path, place: str | None = None) -> None:
    """Raise ValueError where `out` holds a manifest that no index wrote.

    place: URL of which `out` has a copy of the manifest.
    """
    place = place or str(out)
    if not (out / MANIFEST_NAME).exists():
        return
    if not is_dataset(out):
        raise ValueError(
            f"{place}/{MANIFEST_NAME} is not of this package, and is kept: name another --out"
        )
    if INDEXED not in read_manifest(out).settings:
        raise ValueError(
            f"{place} holds a data set that was packed, and needs no index; name a folder of tars, "
            "or another --out"
        )


def check_split_name(split: str) -> None:
    """Raise ValueError for a name that no table may have, as `TableInfo`, or a hidden one."""
    try:
        TableInfo(file=_table_name(split), num_bytes=0, sha256="")
    except ValueError:
        raise ValueError(f"--split: expected a name of a file, got {split!r}") from None
    if not split or split.startswith("."):
        raise ValueError(f"--split: expected a name that is not hidden, got {split!r}")


def index_tars(
    tars: Tars,
    names: dict[str, str],
    columns: Columns,
    info: IndexInfo,
    *,
    out: Path,
    workers: int,
    advance: Advance,
    publish: Callable[[Path], object] = lambda out: None,
) -> Indexed:
    """Index tars, and write `out`/manifest.json, a table a split and refused.jsonl.

    Where named columns are asked for, also a file of them a split.

    names: split by name of a tar. publish: called with `out` when all is written, before what a
    killed index goes on with is removed. A tar that an earlier start has finished is not read
    again. Raises ValueError where no sample can be used, naming why, and where `out` holds another
    data set or another process writes into it. An index that `out` holds stays as it is until all
    of the new one is computed and checked; while files are written `out` is no dataset directory.
    """
    check_out(out)
    with locked(out, RESULTS, "indexed", LEFT):
        results = out / RESULTS
        tasks = {
            name: TarTask(
                tar=tars.tar(name), result=results / f"{number:08d}.index", columns=columns
            )
            for number, name in enumerate(names)
        }
        done = _run_all(list(tasks.values()), workers, advance)
        refused, manifest, tables = _reduce(tasks, names, done, columns, info)
        manifest = replace(manifest, shards_in=tars.shards_in(out))
        manifest = with_columns(manifest, columns, tasks, results)
        _write(out, refused, manifest, tables)
        publish(out)
        shutil.rmtree(results)
    empty = tuple(split for split in dict.fromkeys(names.values()) if split not in tables)
    return Indexed(manifest, Counter(_kind(row) for row in refused), empty)


def _write(
    out: Path, refused: list[dict[str, Any]], manifest: Manifest, tables: dict[str, Rows]
) -> None:
    # A reader never finds a manifest beside the files of another.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    sync(out)
    for split, rows in tables.items():
        write_table(out / _table_name(split), [rows])
        of_columns = f"{split}{COLUMNS_SUFFIX}"
        if manifest.columns:
            os.replace(out / RESULTS / of_columns, out / of_columns)
        else:
            (out / of_columns).unlink(missing_ok=True)  # of an index before
    lines = "".join(json.dumps(row) + "\n" for row in refused)
    write_atomically(out / REFUSED_NAME, lines.encode())
    write_atomically(out / MANIFEST_NAME, manifest.to_json().encode())


def _run_all(tasks: Sequence[TarTask], workers: int, advance: Advance) -> dict[str, TarIndex]:
    """Do the tasks that have no result yet; returns the result of each by the tar's name."""
    done: dict[str, TarIndex] = {}
    left = []
    for task in tasks:
        result = read_result(task)
        if result is None:
            left.append(task)
        else:
            done[task.tar.name] = result
            advance(len(result.rows), result.num_bytes)
    for task in _finished(left, min(workers, len(left))):
        result = read_result(task)
        if result is None:
            raise ValueError(f"{task.tar.place} changed while it was indexed: start again")
        done[task.tar.name] = result
        advance(len(result.rows), result.num_bytes)
    return done


def _finished(tasks: Sequence[TarTask], workers: int) -> Iterator[TarTask]:
    """Do tasks, here or in processes, and yield each when it is done."""
    if workers <= 1:
        for task in tasks:
            run(task)
            yield task
        return
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=follow_parent, initargs=(dict(os.environ),)
    )
    try:
        task_of = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(task_of):
            future.result()
            yield task_of[future]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _reduce(
    tasks: Iterable[str],
    split_of: dict[str, str],
    done: dict[str, TarIndex],
    columns: Columns,
    info: IndexInfo,
) -> tuple[list[dict[str, Any]], Manifest, dict[str, Rows]]:
    """Join the indices of tars; returns what was refused, the manifest and each split's rows."""
    indices = [done[name] for name in tasks]
    refused = [row for index in indices for row in index.refused]
    class_names = _number_classes(indices, columns)
    _check_groups(indices, split_of)
    splits: dict[str, SplitInfo] = {}
    tables: dict[str, Rows] = {}
    start = 0
    for split in dict.fromkeys(split_of.values()):
        of_split = [i for i in indices if split_of[i.name] == split and len(i.rows)]
        if all((index.rows["flags"] & BAD).all() for index in of_split):
            continue
        rows = _rows_of_split(of_split, start)
        start += len(rows)
        splits[split] = _split_info(split, of_split, rows)
        tables[split] = rows
    if not splits:
        reasons = Counter(_kind(row) for row in refused).most_common(3)
        raise ValueError(
            f"expected samples that can be used in {len(indices)} tars, got none: "
            + "; ".join(f"{number} x {reason}" for reason, number in reasons)
        )
    sizes = np.array([index.sizes for index in indices if index.sizes])
    formats = sum((index.formats for index in indices), Counter[str]())
    manifest = Manifest(
        name=info.name,
        class_names=class_names,
        tokenizer=columns.tokenizer,
        image_format="+".join(sorted({"JPEG": "jpg"}.get(f, f.lower()) for f in formats)),
        min_image_size=(int(sizes[:, 0].min()), int(sizes[:, 2].min())),
        max_image_size=(int(sizes[:, 1].max()), int(sizes[:, 3].max())),
        licence=info.licence,
        attribution=info.attribution,
        settings={INDEXED: {**_described(columns), "refused": len(refused)}},
        splits=splits,
        caption_member=columns.caption or TOKENS_MEMBER,
    )
    return refused, manifest, tables


def _described(columns: Columns) -> dict[str, Any]:
    told = {name: getattr(columns, name) for name in ("caption", "label", "group", "decode")}
    return {**told, "column": [*columns.named]} if columns.named else told


def _number_classes(indices: Sequence[TarIndex], columns: Columns) -> tuple[str, ...]:
    """Write the numbers of named classes into the rows; returns the names of all classes.

    Raises ValueError where some labels are names and others numbers.
    """
    named = sorted({name for index in indices for name in index.class_names})
    most = max((int(index.rows["label"].max()) for index in indices if len(index.rows)), default=-1)
    if columns.class_names is not None:
        return columns.class_names
    if named and most >= 0:
        raise ValueError(
            f"{columns.label}: expected names or numbers, got both, such as {named[0]!r} and "
            f"{most}: name all classes by --class-names"
        )
    number_of = {name: number for number, name in enumerate(named)}
    for index in indices:
        for name, rows in index.class_names.items():
            index.rows["label"][rows] = number_of[name]
    return tuple(named) if named else tuple(str(number) for number in range(most + 1))


def _rows_of_split(of_split: Sequence[TarIndex], start: int) -> Rows:
    """Join the rows of tars, with the numbers of shards, and ids that count from `start`."""
    rows: Rows = np.concatenate([index.rows for index in of_split])
    rows["shard"] = np.repeat(np.arange(len(of_split)), [len(index.rows) for index in of_split])
    rows["sample_id"] = start + np.arange(len(rows))
    group = rows["group_id"]
    # A group has the id of its first sample that may be taken, and a sample without one is its own.
    order = np.argsort(rows["flags"] & BAD, kind="stable")
    _, first, number = np.unique(group[order], return_index=True, return_inverse=True)
    of_group = np.empty_like(group)
    of_group[order] = rows["sample_id"][order[first[number]]]
    rows["group_id"] = np.where(group == NO_GROUP, rows["sample_id"], of_group)
    return rows


def _check_groups(indices: Sequence[TarIndex], split_of: dict[str, str]) -> None:
    """Raise ValueError where samples of one group are in two splits."""
    of: dict[str, list[Rows]] = {}
    for index in indices:
        of.setdefault(split_of[index.name], []).append(index.rows["group_id"])
    seen = np.array([NO_GROUP])
    for split, parts in of.items():
        groups = np.unique(np.concatenate(parts))
        if len(np.setdiff1d(np.intersect1d(groups, seen), [NO_GROUP])):
            raise ValueError(
                "--group-column: expected each group in one split, got samples of one in "
                f"{split} and in another: put them into one by --split"
            )
        seen = np.union1d(seen, groups)


def _split_info(split: str, of_split: Sequence[TarIndex], rows: Rows) -> SplitInfo:
    good = rows[(rows["flags"] & BAD) == 0]
    num_captions = sum(index.num_captions for index in of_split)
    return SplitInfo(
        num_samples=len(rows),
        num_captions=num_captions,
        total_captions=num_captions,
        max_captions=1,
        max_alternates=0,
        num_labels=int((good["label"] >= 0).sum()),
        num_groups=len(np.unique(good["group_id"])),
        shards=tuple(
            ShardInfo(
                file=index.name,
                num_samples=len(index.rows),
                num_bytes=index.num_bytes,
                sha256=index.sha256,
            )
            for index in of_split
        ),
        num_bad=len(rows) - len(good),
        table=TableInfo(
            file=_table_name(split),
            num_bytes=rows.nbytes,
            sha256=hashlib.sha256(rows.tobytes()).hexdigest(),
        ),
    )


def _table_name(split: str) -> str:
    return f"{split}{TABLE_SUFFIX}"


def _kind(row: dict[str, Any]) -> str:
    """Return a reason without what differs from sample to sample."""
    return str(row["reason"]).partition(", got")[0]
