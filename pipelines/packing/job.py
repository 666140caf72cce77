"""The job: list a source, write its shards by tasks, go on after a kill, and finish the data set.

DIR, a folder or a URL, has no manifest before all shards are there, so nothing half-written is
taken for a data set. Until then `.packing` in it holds the settings, the listing and a record of
each finished shard.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console

from m3i_fast.config.data import CACHE_DIR
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import PACKED, REFUSED_NAME, Manifest
from m3i_fast.pipelines.dataset.pack import DatasetInfo, write_manifest
from m3i_fast.pipelines.packing.bucket_output import BucketOutput
from m3i_fast.pipelines.packing.class_shares import share_columns, told, with_shares
from m3i_fast.pipelines.packing.items import Listing, Refusal, SourceChanged, SourceOptions
from m3i_fast.pipelines.packing.near_duplicates import Grouped, HashTask, group, hash_tasks
from m3i_fast.pipelines.packing.output import FolderOutput, Output
from m3i_fast.pipelines.packing.plan import (
    PlanSettings,
    Shards,
    make_shards,
    number_items,
    with_groups,
)
from m3i_fast.pipelines.packing.progress import bar
from m3i_fast.pipelines.packing.readers.guess import make_reader, resolve
from m3i_fast.pipelines.packing.readers.named_columns import with_context
from m3i_fast.pipelines.packing.shard_task import (
    Record,
    ShardSettings,
    ShardTask,
    finished,
    forget_sources,
)
from m3i_fast.pipelines.packing.state import SETTINGS, check_unchanged
from m3i_fast.pipelines.packing.workers import Run
from m3i_fast.pipelines.storage.objects import url_of
from m3i_fast.pipelines.storage.requests import Stop, request_pool

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_FREE_SOME = "free some space and start again, the pack goes on where it was"
_HOW_TO_GO_ON = {
    errno.ENOSPC: _FREE_SOME,
    errno.EDQUOT: _FREE_SOME,
    errno.EFBIG: "raise ulimit -f and start again, remove DIR and take a smaller "
    "--samples-per-shard",
}
RESULTS_IN_FLIGHT = 16  # read at the same time, to hide the latency of a bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSettings:
    """What is packed, and how."""

    source: SourceOptions
    plan: PlanSettings
    shard: ShardSettings
    name: str
    licence: str
    attribution: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What became of a pack."""

    manifest: Manifest
    refused: tuple[Refusal, ...]
    changes: dict[str, int]  # pictures by why they were encoded again
    num_cut: int  # captions
    was_there: bool = False  # the data set was whole before


def pack(
    settings: PackSettings,
    out: Path,
    run: Run,
    console: Console,
    *,
    cache_dir: Path = CACHE_DIR,
) -> Packed:
    """Pack a source into the folder or under the URL `out`; killed and called again, it goes on.

    cache_dir: where a pack into a URL has what is on its way there. Raises ValueError where the
    source or the settings differ from those of an unfinished pack in `out`, where `out` holds other
    files, or where no picture can be used, and as `Bucket`.
    """
    url = url_of(out)
    where = BucketOutput.at(url, cache_dir) if url else FolderOutput(Path(out).absolute())
    forget_sources()
    Tokenizer(settings.shard.num_merges, settings.shard.context_length)  # refuses wrong numbers
    source, why = resolve(settings.source)
    where.check_free(source.path)
    try:
        with where.locked():
            is_whole = False
            try:
                packed = _pack_locked(replace(settings, source=source), where, run, console, why)
                is_whole = True
                return packed
            except SourceChanged:
                where.remove(SETTINGS)  # the next start lists the source anew
                raise
            finally:
                where.tidy(is_whole=is_whole)
    except OSError as error:
        if error.errno not in _HOW_TO_GO_ON:
            raise
        flag = "--cache-dir" if url else "DIR"
        raise OSError(
            f"{flag}: {error.strerror}: {error.filename or where.spool}: "
            f"{_HOW_TO_GO_ON[error.errno]}, or name another {flag}"
        ) from error


def _pack_locked(
    settings: PackSettings, out: Output, run: Run, console: Console, why: str
) -> Packed:
    there = out.manifest()
    # A data set that is whole is compared with what is listed, and no picture is read.
    spool = None if there else out.spool
    settings = replace(settings, source=replace(settings.source, spool=spool))
    console.print(f"source: {why}", soft_wrap=True, highlight=False)
    listing = make_reader(settings.source).list()
    shares = settings.plan.class_shares
    columns = with_context(listing.columns, settings.shard.context_length)
    columns += share_columns(listing, shares)
    settings = replace(settings, shard=replace(settings.shard, columns=columns))
    for note in listing.notes:
        console.print(f"  {note}", soft_wrap=True, highlight=False)
    numbered = number_items(listing, settings.plan)
    if not numbered:
        _show_some(listing.refusals, console)
        raise ValueError(
            f"SOURCE: expected a picture that can be used, got none of "
            f"{len(listing.refusals)} in {settings.source.path}"
        )
    described = _describe(settings, listing)
    if there is not None:
        return _already_there(out, there, described)
    check_unchanged(out, described, listing)
    counts = {}
    if settings.plan.near_duplicate_bits is not None:
        kept = sorted(n.sample_id for pictures in numbered.values() for n in pictures)
        grouped = _group_near_duplicates(settings, out, listing, kept, run, console)
        listing = replace(listing, items=grouped.items)
        numbered = number_items(listing, settings.plan, among=frozenset(kept))
        counts["near_duplicates"] = {
            "pictures": grouped.num_pictures,
            "groups": grouped.num_groups,
            "in_another_split": grouped.num_elsewhere,
        }
    numbered = with_shares(numbered, shares, settings.plan.seed)
    for note in told(numbered, shares):
        console.print(f"  {note}", soft_wrap=True, highlight=False)
    shards = make_shards(numbered, settings.plan)
    total = sum(map(len, numbered.values()))
    tasks = list(_tasks(settings, out, listing, shards))
    records = {task.name: record for task, record in _of_earlier_starts(tasks, finished, out)}
    done = sum(len(task.items) for task in tasks if task.name in records)
    if done:
        console.print(f"going on: {done} of {total} pictures are packed", highlight=False)
    with bar(console, f"packing {settings.name}", total, done) as advance:
        left = [task for task in tasks if task.name not in records]
        records.update((task.name, record) for task, record in run(left, advance))
        # Groups are named by a picture: where that is refused, by another, in few shards.
        refused = [i for record in records.values() for i, _ in record.refused]
        items = {task.name: task.items for task in tasks}
        shards = make_shards(with_groups(numbered, refused), settings.plan)
        again = [
            task
            for task in _tasks(settings, out, listing, shards)
            if task.items != items[task.name]
        ]
        records.update((task.name, record) for task, record in run(again, lambda number: None))
    return _finish(settings, out, listing, shards, records, described, counts, console)


def _group_near_duplicates(
    settings: PackSettings,
    out: Output,
    listing: Listing,
    kept: Sequence[int],
    run: Run,
    console: Console,
) -> Grouped:
    """Hash the pictures at some places of a listing, and return all of it with these in groups."""
    bits = settings.plan.near_duplicate_bits
    assert bits is not None
    items = [listing.items[place] for place in kept]
    tasks = hash_tasks(items, out, settings.source, listing.files, settings.shard.max_pixels)
    results = _of_earlier_starts(tasks, HashTask.finished, out)
    found = {task.number: hashed for task, hashed in results}
    done = sum(map(len, found.values()))
    with bar(console, f"hashing {settings.name}", len(items), done) as advance:
        left = [task for task in tasks if task.number not in found]
        found.update((task.number, hashed) for task, hashed in run(left, advance))
    grouped = group(items, np.concatenate([found[task.number] for task in tasks]), bits)
    all_items = list(listing.items)
    for place, item in zip(kept, grouped.items, strict=True):
        all_items[place] = item
    return grouped._replace(items=all_items)


def _of_earlier_starts(
    tasks: Sequence[_Task],
    look_up: Callable[[_Task, Mapping[str, int], Stop], _Result | None],
    out: Output,
) -> list[tuple[_Task, _Result]]:
    """Return the tasks that earlier starts have finished, with their results.

    look_up: reads a result, if it is among the files that the output has, by their sizes.
    """
    sizes = out.sizes()
    with request_pool(RESULTS_IN_FLIGHT, "record-reader") as (pool, stop):
        results = pool.map(lambda task: look_up(task, sizes, stop), tasks)
        pairs = zip(tasks, results, strict=True)
        return [(task, result) for task, result in pairs if result is not None]


def _tasks(
    settings: PackSettings, out: Output, listing: Listing, shards: Shards
) -> Iterator[ShardTask]:
    for split in shards.values():
        for name, items in split:
            yield ShardTask(
                out=out,
                name=name,
                items=items,
                source=settings.source,
                files=listing.files,
                settings=settings.shard,
            )


def _describe(settings: PackSettings, listing: Listing) -> dict[str, Any]:
    """Return the settings that a data set's bytes depend on, and a digest of what was listed.

    Neither says where the source lies, nor when its files were written.
    """
    options = asdict(settings.source)
    for name in ("path", "spool", "image_root", "max_unpacked_gib"):
        del options[name]
    if not options["columns"]:
        del options["columns"]  # as before there were any
    plan = asdict(settings.plan)
    if plan["near_duplicate_bits"] is None:
        del plan["near_duplicate_bits"]  # as before there was such a setting
    if not plan["class_shares"]:
        del plan["class_shares"]  # the same
    digest = hashlib.sha256()
    for name, (size, _) in listing.files.items():
        digest.update(json.dumps([name, size]).encode() + b"\n")
    for item in listing.items:
        content = [item.name, item.split, item.captions, item.label, item.group, item.stamp[0]]
        content += [item.columns] if item.columns else []
        digest.update(json.dumps(content).encode() + b"\n")
    described = {"source": options, "source_sha256": digest.hexdigest()}
    described |= {**plan, **settings.shard.described()}
    described |= {"name": settings.name, "licence": settings.licence}
    described |= {"attribution": settings.attribution}
    return dict(json.loads(json.dumps(described)))


def _already_there(out: Output, manifest: Manifest, described: dict[str, Any]) -> Packed:
    """Return a data set that was packed of the same source; ValueError where it is another."""
    before = manifest.settings.get(PACKED)
    if before != described:
        named = [
            k for k in described if not isinstance(before, dict) or before.get(k) != described[k]
        ]
        raise ValueError(
            f"DIR: {out.place} holds a data set of another source or of other settings ("
            f"{', '.join(named)}): name another directory, or remove it"
        )
    lines = (out.read(REFUSED_NAME) or b"").splitlines()
    refused = tuple(Refusal(**json.loads(line)) for line in lines)
    return Packed(manifest=manifest, refused=refused, changes={}, num_cut=0, was_there=True)


def _finish(
    settings: PackSettings,
    out: Output,
    listing: Listing,
    shards: Shards,
    records: dict[str, Record],
    described: dict[str, Any],
    counts: dict[str, Any],
    console: Console,
) -> Packed:
    """Write what reduces the records: refusals, and last the manifest."""
    of_tasks = sorted(entry for record in records.values() for entry in record.refused)
    refused = (*listing.refusals, *(refusal for _, refusal in of_tasks))
    packed = {
        split: [found for name, _ in names if (found := records[name].packed) is not None]
        for split, names in shards.items()
    }
    empty = [split for split, found in packed.items() if not found]
    for split in empty:
        del packed[split]
    if not packed:
        raise ValueError(
            f"split {', '.join(empty)}: expected a picture that can be used, got none; the first "
            f"refused: {refused[0].file}: {refused[0].reason}"
        )
    for split in empty:
        console.print(
            f"split {split} is left out: all of its pictures are refused",
            soft_wrap=True,
            highlight=False,
        )
    changes: Counter[str] = Counter()
    for record in records.values():
        changes.update(record.changes)
    num_cut = sum(record.num_cut for record in records.values())
    lines = [json.dumps(refusal._asdict()) + "\n" for refusal in refused]
    out.write(REFUSED_NAME, "".join(lines).encode())
    info = DatasetInfo(
        name=settings.name,
        class_names=listing.class_names,
        tokenizer=Tokenizer(settings.shard.num_merges, settings.shard.context_length).info,
        licence=settings.licence,
        attribution=settings.attribution,
        settings={PACKED: described},
        columns=settings.shard.columns,
    )
    counts |= {
        "num_refused": len(refused),
        "encoded_again": dict(sorted(changes.items())),
        "captions_cut": num_cut,
    }
    with out.described() as folder:
        manifest = write_manifest(folder, packed, info, counts)
    return Packed(
        manifest=manifest, refused=refused, changes=dict(changes.most_common()), num_cut=num_cut
    )


def _show_some(refusals: Sequence[Refusal], console: Console) -> None:
    for refusal in refusals[:10]:
        console.print(
            f"  {refusal.file}: {refusal.reason}; {refusal.what_to_do}",
            soft_wrap=True,
            highlight=False,
        )
