"""Read a whole dataset directory and compare it with what its manifest says."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np

from m3i_fast.pipelines.captions import LENGTHS, TOKENS
from m3i_fast.pipelines.corrupt import caption_fault
from m3i_fast.pipelines.manifest import (
    Manifest,
    ShardInfo,
    check_files,
    read_manifest,
    sha256_file,
)
from m3i_fast.pipelines.samples import Counts
from m3i_fast.pipelines.shards import Member, members

INTEGERS = ("cls", "sid", "gid")


def verify(path: Path) -> Manifest:
    """Read every byte; ValueError at the first difference.

    Names the sample whose captions, label or ids are not such, the file whose digest is another, or
    the count that the manifest has wrong. Pictures are not decoded: the packer has done it, and the
    digest stands for its bytes.
    """
    manifest = read_manifest(path)
    for name, split in manifest.splits.items():
        check_files(path, split)
        counts = Counts()
        for shard in split.shards:
            _check_digest(path / shard.index_file, shard.index_sha256)
            _count(path, shard, manifest, counts)
            _check_digest(path / shard.file, shard.sha256)
        found = counts.split(split.shards)
        for key in (f.name for f in fields(split)):
            if getattr(found, key) != getattr(split, key):
                raise ValueError(
                    f"{path}: split {name}: expected {key} {getattr(split, key)} (manifest), "
                    f"got {getattr(found, key)}"
                )
    return manifest


def _check_digest(file: Path, expected: str) -> None:
    got = sha256_file(file)
    if got != expected:
        raise ValueError(f"{file}: expected sha256 {expected}, got {got}")


def _count(path: Path, shard: ShardInfo, manifest: Manifest, counts: Counts) -> None:
    """Add the samples of a shard, once each is seen to be whole."""
    for sample in members(path, shard, (TOKENS, LENGTHS, *INTEGERS)):
        wrong = caption_fault(sample, manifest.tokenizer)
        if wrong is not None:
            raise ValueError(f"{path / shard.file}: {wrong}")
        label, _, group_id = (_integer(path / shard.file, sample, name) for name in INTEGERS)
        if not -1 <= label < len(manifest.class_names):
            raise ValueError(
                f"{path / shard.file}: {sample['cls'].name}: expected a label from -1 to "
                f"{len(manifest.class_names) - 1}, got {label}"
            )
        num_captions = len(sample[LENGTHS].content) // 4 if LENGTHS in sample else TOKENS in sample
        counts.add(num_captions=int(num_captions), label=label, group_id=group_id)


def _integer(file: Path, sample: dict[str, Member], name: str) -> int:
    member = sample.get(name)
    if member is None:
        beside = next(iter(sample.values())).name if sample else "a sample"
        raise ValueError(f"{file}: expected a component {name} beside {beside}, got none")
    if len(member.content) != 8:
        raise ValueError(f"{file}: {member.name}: expected 8 bytes, got {len(member.content)}")
    return int(np.frombuffer(member.content, "<i8")[0])
