"""Diagnosis of a failed pipeline: find and name the sample that stopped it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from m3i_fast.pipelines.dataset import alternates, captions
from m3i_fast.pipelines.dataset.manifest import Manifest, SplitInfo, quoted
from m3i_fast.pipelines.dataset.pictures import FORMATS, decode
from m3i_fast.pipelines.dataset.samples import check_alternate
from m3i_fast.pipelines.dataset.tar_shards import INTEGERS, Member, members

NAMED = re.compile(r"Failed to decode sample #\d+ : (?P<source>.+)")
# All components but the pictures, and the pictures with the sizes of alternates.
SMALL = (captions.TOKENS, captions.LENGTHS, alternates.SIZES, *INTEGERS)
LARGE = (*FORMATS, alternates.PICTURES, alternates.SIZES)


def pipeline_error(
    path: Path, split: SplitInfo, manifest: Manifest, max_pixels: int, error: RuntimeError
) -> RuntimeError:
    """Make an error that names the bad sample, or has DALI's text where no sample is bad.

    DALI names a sample whose pixels fail to decode, but not one whose header cannot be parsed or
    whose captions are too long; for those the split is read again up to the first bad one.
    """
    match = NAMED.search(str(error))
    if match:
        return _error(path, match["source"], "--decode ")
    source = find_fault(path, split, manifest)
    if source is not None:
        return _error(path, source)
    source = find_bad_picture(path, split, max_pixels)
    if source is not None:
        return _error(path, source, "--decode ")
    return RuntimeError(f"the data pipeline stopped: {error}")


def sample_error(path: Path, split: SplitInfo, manifest: Manifest, sample_id: int) -> RuntimeError:
    """Make an error that names the sample of that id and what is wrong beside its picture."""
    return _error(path, find_fault(path, split, manifest, sample_id) or f"{sample_id}")


def _error(path: Path, source: str, flag: str = "") -> RuntimeError:
    """Make an error with the command that finds this sample and others like it."""
    return RuntimeError(
        f"corrupt sample {source} in {path}; check the files with: "
        f"m3i-fast data verify {flag}{quoted(path)}"
    )


def find_bad_picture(path: Path, split: SplitInfo, max_pixels: int) -> str | None:
    """Find the first picture that Pillow cannot decode: shard:member (what is wrong)."""
    for shard in split.shards:
        for sample in members(path, shard, LARGE):
            fault = picture_fault(sample, max_pixels)
            if fault is not None:
                return f"{shard.file}:{fault}"
    return None


def find_fault(
    path: Path, split: SplitInfo, manifest: Manifest, sample_id: int | None = None
) -> str | None:
    """Find the first bad sample, or check that of an id: shard:member (what is wrong)."""
    for shard in split.shards:
        for sample in members(path, shard, SMALL):
            if sample_id is None or sample["sid"].content == np.array(sample_id, "<i8").tobytes():
                fault = sample_fault(sample, manifest)
                if fault is not None:
                    return f"{shard.file}:{fault}"
    return None


def picture_fault(sample: dict[str, Member], max_pixels: int) -> str | None:
    """Decode a sample's pictures; returns "member (what is wrong)", or None."""
    for extension in FORMATS.keys() & sample.keys():
        member = sample[extension]
        try:
            size = decode(member.content, extension, max_pixels)
            if alternates.PICTURES in sample:
                member = sample[alternates.PICTURES]
                for picture in alternates.split(member.content, sample[alternates.SIZES].content):
                    check_alternate(picture, extension, size, max_pixels)
        except ValueError as error:
            return f"{member.name} ({error})"
    return None


def sample_fault(sample: dict[str, Member], manifest: Manifest) -> str | None:
    """Check a sample's captions, label and ids; returns "member (what is wrong)", or None."""
    tokens, lengths = sample.get(captions.TOKENS), sample.get(captions.LENGTHS)
    fault = captions.stored_fault(
        tokens and tokens.content, lengths and lengths.content, manifest.tokenizer
    )
    named = tokens or lengths
    if fault is not None and named is not None:
        return f"{named.name} ({fault})"
    label, largest = integer(sample, "cls"), len(manifest.class_names) - 1
    if not -1 <= label <= largest:
        return f"{sample['cls'].name} (expected a label from -1 to {largest}, got {label})"
    for name in ("sid", "gid"):
        if integer(sample, name) < 0:
            return f"{sample[name].name} (expected at least 0, got {integer(sample, name)})"
    return None


def integer(sample: dict[str, Member], name: str) -> int:
    """Read an int64 component, whose 8 bytes the checked index guarantees."""
    return int(np.frombuffer(sample[name].content, "<i8")[0])
