"""Verification of a dataset directory: every byte is read and compared with the manifest."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset import alternates, captions
from m3i_fast.pipelines.dataset.diagnosis import LARGE, SMALL, integer, picture_fault, sample_fault
from m3i_fast.pipelines.dataset.directory import check_split
from m3i_fast.pipelines.dataset.manifest import (
    Manifest,
    check_files,
    read_manifest,
    sha256_file,
)
from m3i_fast.pipelines.dataset.samples import Counts, Identities
from m3i_fast.pipelines.dataset.tar_shards import INTEGERS, members


def verify(path: Path, *, decode: bool = False, max_pixels: int = MAX_PIXELS) -> Manifest:
    """Verify a dataset by reading every byte, and return its manifest.

    Makes the checks of opening it (`directory.check_split`), then those of captions, labels, ids,
    digests and counts. decode: decode every picture; otherwise its header alone is parsed, since
    the packer has decoded it and the digest covers its bytes. Raises ValueError at the first
    difference, naming the sample, the file or the count.
    """
    manifest = read_manifest(path)
    identities = Identities()
    for name, split in manifest.splits.items():
        check_files(path, manifest, split)
        if split.table is not None:
            _check_digest(path / split.table.file, split.table.sha256)
        for shard in split.shards:
            if shard.index_sha256 is not None:
                _check_digest(path / shard.index_file, shard.index_sha256)
        check_split(path, name, split, max_pixels=max_pixels)
        _read_samples(path, name, manifest, identities, max_pixels if decode else None)
    return manifest


def _check_digest(file: Path, expected: str) -> None:
    got = sha256_file(file)
    if got != expected:
        raise ValueError(f"{file}: expected sha256 {expected}, got {got}")


def _read_samples(
    path: Path,
    name: str,
    manifest: Manifest,
    identities: Identities,
    max_pixels: int | None,
) -> None:
    """Check the contents of a split, and decode its pictures where `max_pixels` is given."""
    split = manifest.splits[name]
    counts = Counts()
    wanted = SMALL if max_pixels is None else (*SMALL, *LARGE)
    for shard in split.shards:
        for sample in members(path, shard, wanted):
            fault = sample_fault(sample, manifest)
            if fault is None and max_pixels is not None:
                fault = picture_fault(sample, max_pixels)
            if fault is not None:
                raise ValueError(f"{path / shard.file}: {fault}")
            label, sample_id, group_id = (integer(sample, key) for key in INTEGERS)
            try:
                identities.add(sample_id, group_id, name)
            except ValueError as error:
                raise ValueError(f"{path / shard.file}: {sample['sid'].name}: {error}") from error
            num_bytes = {extension: len(member.content) for extension, member in sample.items()}
            counts.add(
                num_captions=captions.count(num_bytes),
                num_alternates=alternates.count(num_bytes),
                label=label,
                group_id=group_id,
            )
        _check_digest(path / shard.file, shard.sha256)
    identities.check_groups(name)
    counted = replace(counts.split(split.shards), table=split.table)
    for key in (f.name for f in fields(split)):
        if getattr(counted, key) != getattr(split, key):
            raise ValueError(
                f"{path}: split {name}: expected {key} {getattr(split, key)} (manifest), "
                f"got {getattr(counted, key)}"
            )
