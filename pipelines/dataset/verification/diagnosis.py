"""What is wrong with a sample, if anything: its pictures, captions, label and ids."""

from __future__ import annotations

import numpy as np

from m3i_fast.pipelines.dataset import alternates
from m3i_fast.pipelines.dataset.annotations import captions
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.dataset.pictures import FORMATS, decode
from m3i_fast.pipelines.dataset.samples import check_alternate
from m3i_fast.pipelines.dataset.tar_shards import INTEGERS, Member

# All components but the pictures, and the pictures with the sizes of alternates.
SMALL = (captions.TOKENS, captions.LENGTHS, alternates.SIZES, *INTEGERS)
LARGE = (*FORMATS, alternates.PICTURES, alternates.SIZES)


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
