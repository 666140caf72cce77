"""Name the sample that stopped the pipeline. Only reached once something has failed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from m3i_fast.pipelines import captions
from m3i_fast.pipelines.manifest import SplitInfo
from m3i_fast.pipelines.samples import PILLOW_FORMAT, decode_size
from m3i_fast.pipelines.shards import Member, members
from m3i_fast.pipelines.tokens import TokenizerInfo

NAMED = re.compile(r"Failed to decode sample #\d+ : (?P<source>.+)")


def sample_error(
    path: Path, split: SplitInfo, tokenizer: TokenizerInfo, error: RuntimeError
) -> RuntimeError:
    """An error with the sample's name, or with DALI's text alone where no sample is bad.

    DALI names a sample whose pixels fail to decode, but not one whose header cannot be parsed or
    whose captions are too long; for those the split is read again until the first bad one.
    """
    match = NAMED.search(str(error))
    if match:
        return _error(path, match["source"])
    source = find_bad_captions(path, split, tokenizer) or find_bad_image(path, split)
    if source is None:
        return RuntimeError(f"the data pipeline stopped: {error}")
    return _error(path, source)


def caption_error(
    path: Path, split: SplitInfo, tokenizer: TokenizerInfo, sample_id: int
) -> RuntimeError:
    """An error that names the sample of that id and says what is wrong with its captions."""
    source = find_bad_captions(path, split, tokenizer, sample_id)
    return _error(path, source or f"{sample_id} (its captions)")


def _error(path: Path, source: str) -> RuntimeError:
    return RuntimeError(
        f"corrupt sample {source} in {path}; check the files with: m3i-fast data verify {path}"
    )


def find_bad_image(path: Path, split: SplitInfo) -> str | None:
    """shard:member of the first image that Pillow cannot decode."""
    for shard in split.shards:
        for sample in members(path, shard, PILLOW_FORMAT):
            for image in sample.values():
                try:
                    decode_size(image.content)
                except Exception:  # Pillow raises a dozen types on corrupt data
                    return f"{shard.file}:{image.name}"
    return None


def find_bad_captions(
    path: Path, split: SplitInfo, tokenizer: TokenizerInfo, sample_id: int | None = None
) -> str | None:
    """shard:member (what is wrong) of the first bad captions; given an id, of that sample's."""
    for shard in split.shards:
        for sample in members(path, shard, (captions.TOKENS, captions.LENGTHS, "sid")):
            if sample_id is None or sample["sid"].content == np.array(sample_id, "<i8").tobytes():
                found = caption_fault(sample, tokenizer)
                if found is not None:
                    return f"{shard.file}:{found}"
    return None


def caption_fault(sample: dict[str, Member], tokenizer: TokenizerInfo) -> str | None:
    """member (what is wrong) of a sample's captions; None: nothing."""
    tokens, lengths = sample.get(captions.TOKENS), sample.get(captions.LENGTHS)
    found = captions.stored_fault(tokens and tokens.content, lengths and lengths.content, tokenizer)
    named = tokens or lengths
    return f"{named.name} ({found})" if found is not None and named is not None else None
