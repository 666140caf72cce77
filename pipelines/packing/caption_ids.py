"""Texts of a picture as token ids, of captions and columns: what is cut, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.columns import REGION_TOKENS
from m3i_fast.config.columns import ColumnKind as Kind
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.packing.items import Refused, printable
from m3i_fast.pipelines.packing.readers.regions import Value, shares_of

LongCaptions = Literal["cut", "refuse"]


def caption_ids(
    tokenizer: Tokenizer,
    captions: tuple[str, ...],
    long_captions: LongCaptions,
    what: str = "caption",
) -> tuple[tuple[NDArray[np.int32], ...], int]:
    """Encode the captions of a picture, and count those that were cut to the context's length.

    One of which nothing is left after cleaning is left out. Raises Refused, which calls it `what`,
    for one that is too long, where these are refused, or is no caption at all.
    """
    encoded, num_cut = [], 0
    for text in captions:
        ids, whole = tokenizer.encode_and_count(text, tokenizer.context_length)
        if whole > len(ids) and long_captions == "refuse":
            raise Refused(
                f"{what}: expected at most {tokenizer.context_length} token ids, got more",
                "shorten it, raise --context-length, or say --long-captions cut",
            )
        if whole > 2:  # more than start and end
            encoded.append(ids)
            num_cut += whole > len(ids)
    return tuple(encoded), num_cut


def column_ids(
    tokenizer: Tokenizer,
    kinds: Mapping[str, Kind],
    values: Mapping[str, Any],
    size: Callable[[], tuple[int, int]],
    long_captions: LongCaptions,
) -> tuple[dict[str, Any], int]:
    """Encode the texts in a picture's named columns, and count those that were cut.

    kinds: of each column. values: of each column, as `named_columns.read_value` returns them. size:
    gives height and width of the upright picture, which boxes are shares of. Returns the values as
    `ColumnInfo.row` takes texts and regions, and the others as they are. Raises Refused.
    """
    found, num_cut = dict(values), 0
    for name, kind in kinds.items():
        value = values.get(name)
        if value is None or kind not in ("text", "regions"):
            continue
        if kind == "text":
            ids, was_cut = caption_ids(tokenizer, (value,), long_captions, name)
            found[name] = ids[0].tolist() if ids else None
        else:
            found[name], was_cut = _region_ids(tokenizer, name, value, size(), long_captions)
        num_cut += was_cut
    return found, num_cut


def _region_ids(
    tokenizer: Tokenizer,
    name: str,
    value: Value,
    size: tuple[int, int],
    long_captions: LongCaptions,
) -> tuple[list[tuple[list[float], list[int]]], int]:
    """Return (box in shares, token ids) of each region, and how many of their texts were cut."""
    length = min(tokenizer.context_length, REGION_TOKENS)
    short = cached_tokenizer(tokenizer.num_merges, length)
    regions, num_cut = [], 0
    for number, (box, text) in enumerate(shares_of(name, value, size)):
        where = f"{name}: region {number}"
        ids, was_cut = caption_ids(short, (text,), long_captions, where)
        if not ids:
            raise Refused(
                f"{where}: expected words, got {printable(text[:60])!r}",
                "mend the text, or take the region out",
            )
        regions.append((box, ids[0].tolist()))
        num_cut += was_cut
    return regions, num_cut


@lru_cache(maxsize=4)
def cached_tokenizer(num_merges: int | None, context_length: int) -> Tokenizer:
    """Return a tokenizer, which is built once in a process."""
    return Tokenizer(num_merges, context_length)
