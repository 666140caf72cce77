"""Verification of a data set: every byte is read, and every fault is named."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.annotations.columns import Known
from m3i_fast.pipelines.dataset.directory import check_split
from m3i_fast.pipelines.dataset.files import Advance, DatasetFiles, LocalFiles
from m3i_fast.pipelines.dataset.manifest import TABLE, Manifest, ShardInfo, sha256_file
from m3i_fast.pipelines.dataset.sample_table import Rows, SampleTable
from m3i_fast.pipelines.dataset.samples import Counts, Identities
from m3i_fast.pipelines.dataset.tar_shards import INTEGERS, members
from m3i_fast.pipelines.dataset.verification.diagnosis import (
    LARGE,
    SMALL,
    integer,
    picture_fault,
    sample_fault,
)
from m3i_fast.pipelines.dataset.verification.verify_shard import Fault, ShardReport, read_shard

BLOCK = 1 << 20  # ids looked up at a time
SAID = 5  # faults in the message of an error


@dataclass(slots=True)
class Report:
    """What a verification found."""

    manifest: Manifest
    faults: list[Fault] = field(default_factory=list)


def verify(path: Path, *, decode: bool = False, max_pixels: int = MAX_PIXELS) -> Manifest:
    """Verify a dataset as `find_faults`, and return its manifest.

    Raises ValueError with the first faults, and as `read_manifest`.
    """
    report = find_faults(path, decode=decode, max_pixels=max_pixels)
    if report.faults:
        more = len(report.faults) - SAID
        said = "; ".join(str(fault) for fault in report.faults[:SAID])
        raise ValueError(said + (f"; and {more} more" if more > 0 else ""))
    return report.manifest


def find_faults(
    where: Path | DatasetFiles,
    *,
    decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    advance: Advance = lambda num_bytes: None,
) -> Report:
    """Read every byte of a dataset, and list whatever differs from what it should be.

    Makes the checks of opening it (`directory.check_split`), then those of every sample's checksum,
    of captions, labels, ids, digests and counts. decode: decode every picture; otherwise its header
    alone is parsed, since the packer has decoded it and the digest covers its bytes. A shard that
    is missing or has another size is not read. advance: told the bytes of shards that are read.
    Raises as `read_manifest`, and as `Bucket` where that cannot be read.
    """
    files = LocalFiles(where) if isinstance(where, Path) else where
    manifest = files.manifest
    report = Report(manifest)
    identities = Identities()
    for name, split in manifest.splits.items():
        look = _Look(files, name, max_pixels, decode, advance)
        broken = dict(files.faults(split))
        if broken:
            report.faults += [Fault(file, None, str(error)) for file, error in broken.items()]
            if split.tables and not broken.keys() & {table.file for table in split.tables}:
                report.faults += _split_with_table(look, broken)
            continue
        faults = list(_check_digests(files, name))
        try:
            check_split(files, name, max_pixels=max_pixels)
        except (FileNotFoundError, ValueError) as error:  # the former of what is removed meanwhile
            faults.append(Fault(name, None, str(error)))
        if split.table is None:
            faults += _indexed_split(look, identities)
        else:
            faults += _split_with_table(look)
        report.faults += _without_repeats(faults)
    if not report.faults and manifest.format_version >= TABLE:
        report.faults += _check_ids(files)
    return report


@dataclass(frozen=True, slots=True)
class _Look:
    """A split, and how closely it is looked at."""

    files: DatasetFiles
    name: str
    max_pixels: int
    decode: bool
    advance: Advance


def _without_repeats(faults: list[Fault]) -> list[Fault]:
    """Leave out what the checks of opening said again."""
    said = [fault for fault in faults if fault.sample is not None]
    return [
        fault
        for fault in faults
        if fault.sample is not None
        or not any(f"sample {other.sample} " in fault.reason for other in said)
    ]


def _check_digests(files: DatasetFiles, name: str) -> Iterator[Fault]:
    """Compare the digests of a split's table and indices."""
    split = files.manifest.splits[name]
    recorded = [(shard.index_file, shard.index_sha256) for shard in split.shards]
    recorded += [(table.file, table.sha256) for table in split.tables]
    for file, expected in recorded:
        if expected is not None and (got := sha256_file(files.folder / file)) != expected:
            reason = f"{files.place}/{file}: expected sha256 {expected}, got {got}"
            yield Fault(file, None, reason)


def _split_with_table(look: _Look, broken: Collection[str] = ()) -> Iterator[Fault]:
    """Read the shards of a split as its table says, but for broken ones, and compare counts."""
    files, name, manifest = look.files, look.name, look.files.manifest
    table = SampleTable.open(files.folder, manifest, name)
    split = manifest.splits[name]
    shard_of = np.ascontiguousarray(table.rows["shard"])
    if (shard_of[1:] < shard_of[:-1]).any():
        at = int(np.argmax(shard_of[1:] < shard_of[:-1])) + 1
        reason = f"row {at}: shard: expected rows in the order of shards, got {shard_of[at]}"
        reason += f" after {shard_of[at - 1]}"
        yield Fault(name, None, f"{files.place}: split {name}: {reason}")
        return
    yield from _check_columns(look, table)
    first = np.searchsorted(shard_of, np.arange(len(split.shards) + 1, dtype=shard_of.dtype))
    counts = Counts()
    num_bad, is_good = 0, not broken
    for number, shard in enumerate(split.shards):
        if shard.file in broken:
            continue
        rows = table.rows[first[number] : first[number + 1]]
        report = _read_shard(look, shard, rows, counts)
        num_bad += report.num_bad
        is_good = is_good and not report.faults
        yield from report.faults
    if is_good:
        yield from _check_counts(files, name, counts, num_bad)


def _check_columns(look: _Look, table: SampleTable) -> Iterator[Fault]:
    """Check every value of the named columns, and what the manifest counts of them."""
    info, columns = look.files.manifest.splits[look.name].columns, table.columns
    if info is None or columns is None:
        return
    counts = Known(columns.columns)
    for start in range(0, len(table), BLOCK):
        numbers = np.arange(start, min(start + BLOCK, len(table)))
        if (fault := columns.fault(numbers)) is not None:
            yield Fault(info.file, None, fault)
            return
        counts.add(columns.rows[numbers])
    for key, counted in counts.result().items():
        if counted != getattr(info, key):
            said = f"expected {key} {getattr(info, key)} (manifest), got {counted}"
            yield Fault(info.file, None, f"{look.files.place}/{info.file}: {said}")


def _read_shard(look: _Look, shard: ShardInfo, rows: Rows, counts: Counts) -> ShardReport:
    """Read a shard, and count its samples; one that changes meanwhile is a fault."""
    files = look.files
    report = ShardReport(
        file=files.name(shard.file),
        shard=shard,
        manifest=files.manifest,
        max_pixels=look.max_pixels,
        decode=look.decode,
        max_alternates=files.manifest.splits[look.name].max_alternates,
        advance=look.advance,
    )
    try:
        with closing(files.open(shard.file, is_whole=True)) as tar:
            for row in read_shard(report, tar, rows):
                counts.add(
                    num_captions=row.num_captions,
                    num_alternates=row.num_alternates,
                    label=row.label,
                    group_id=row.group_id,
                )
    except (FileNotFoundError, ValueError) as error:  # the former of what is removed meanwhile
        report.faults.append(Fault(shard.file, None, str(error)))
    return report


def _check_counts(files: DatasetFiles, name: str, counts: Counts, num_bad: int) -> Iterator[Fault]:
    split, place = files.manifest.splits[name], files.place
    try:
        counted = replace(
            counts.split(split.shards),
            table=split.table,
            columns=split.columns,
            num_bad=num_bad,
            num_samples=counts.num_samples + num_bad,
        )
    except ValueError as error:
        yield Fault(name, None, f"{place}: split {name}: {error}")
        return
    for key in (f.name for f in fields(split)):
        if getattr(counted, key) != getattr(split, key):
            yield Fault(
                name,
                None,
                f"{place}: split {name}: expected {key} {getattr(split, key)} (manifest), got "
                f"{getattr(counted, key)}",
            )


def _check_ids(files: DatasetFiles) -> Iterator[Fault]:
    """Check that ids are those of one sample each, and groups those of a sample of one split."""
    manifest, place = files.manifest, files.place
    seen: list[NDArray[np.int64]] = []  # sorted ids of each split
    for name in manifest.splits:
        rows = SampleTable.open(files.folder, manifest, name).rows
        samples = np.sort(rows["sample_id"])
        found = [samples[1:][samples[1:] == samples[:-1]][:1]]
        found += [_first(samples, others, is_in=True) for others in seen]
        twice = np.concatenate(found)
        if len(twice):
            reason = f"sample_id: expected another one for each sample, got {twice[0]} twice"
            yield Fault(name, str(twice[0]), f"{place}: split {name}: {reason}")
        seen.append(samples)
        strange = _first(rows["group_id"], samples, is_in=False)
        if len(strange):
            reason = f"expected the sample_id of a sample of split {name}, got {strange[0]}"
            yield Fault(name, None, f"{place}: group_id: {reason}")


def _first(values: NDArray[np.int64], ids: NDArray[np.int64], *, is_in: bool) -> NDArray[np.int64]:
    """Return the first value that is among sorted ids, or is not; empty for none.

    In blocks, so that it takes no memory for each value.
    """
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        place = np.minimum(np.searchsorted(ids, block), len(ids) - 1)
        found = block[(ids[place] == block) == is_in]
        if len(found):
            return found[:1]
    return values[:0]


def _indexed_split(look: _Look, identities: Identities) -> Iterator[Fault]:
    """Check the contents of a split of format version 1 to 3, shard by shard."""
    path, name, manifest = look.files.folder, look.name, look.files.manifest
    max_pixels = look.max_pixels if look.decode else None
    split = manifest.splits[name]
    counts = Counts()
    is_good = True
    for shard in split.shards:
        try:
            faults = _indexed_shard(path, shard, name, manifest, identities, counts, max_pixels)
            for fault in faults:
                is_good = False
                yield fault
        except ValueError:  # of its index, which the checks of opening named
            is_good = False
        digest = sha256_file(path / shard.file)
        if digest != shard.sha256:
            is_good = False
            reason = f"{path / shard.file}: expected sha256 {shard.sha256}, got {digest}"
            yield Fault(shard.file, None, reason)
        look.advance(shard.num_bytes)
    if is_good:
        try:
            identities.check_groups(name)
        except ValueError as error:
            yield Fault(name, None, str(error))
        yield from _check_counts(look.files, name, counts, 0)


def _indexed_shard(
    path: Path,
    shard: ShardInfo,
    name: str,
    manifest: Manifest,
    identities: Identities,
    counts: Counts,
    max_pixels: int | None,
) -> Iterator[Fault]:
    """Check the samples of a shard, and decode their pictures where `max_pixels` is given."""
    file = path / shard.file
    wanted = SMALL if max_pixels is None else (*SMALL, *LARGE)
    for sample in members(path, shard, wanted):
        key = sample["sid"].name.removesuffix(".sid")
        fault = sample_fault(sample, manifest)
        if fault is None and max_pixels is not None:
            fault = picture_fault(sample, max_pixels)
        if fault is None:
            label, sample_id, group_id = (integer(sample, number) for number in INTEGERS)
            try:
                identities.add(sample_id, group_id, name)
            except ValueError as error:
                fault = f"{sample['sid'].name}: {error}"
        if fault is not None:
            yield Fault(shard.file, key, f"{file}: {fault}")
            continue
        num_bytes = {extension: len(member.content) for extension, member in sample.items()}
        counts.add(
            num_captions=captions.count(num_bytes),
            num_alternates=alternates.count(num_bytes),
            label=label,
            group_id=group_id,
        )
