"""Captions of a picture as token ids: how one or several are stored and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo

TOKENS, LENGTHS = "tok", "len"  # components of a sample in a shard


def components(captions: Sequence[NDArray[np.int32]]) -> Iterator[tuple[str, bytes]]:
    """Yield (extension, content) of a sample's captions: ids joined, and lengths of several."""
    if captions:
        yield TOKENS, np.concatenate(captions).astype("<i4").tobytes()
    if len(captions) > 1:
        yield LENGTHS, np.array([len(ids) for ids in captions], dtype="<i4").tobytes()


def count(num_bytes: Mapping[str, int]) -> int:
    """Count the captions of a sample by the sizes of its components."""
    return num_bytes[LENGTHS] // 4 if LENGTHS in num_bytes else int(TOKENS in num_bytes)


def separate(tokens: bytes | None, lengths: bytes | None) -> list[NDArray[np.int32]]:
    """Return the token ids of each caption of a sample's stored components; None: absent."""
    if tokens is None:
        return []
    ids = np.frombuffer(tokens, "<i4")
    if lengths is None:
        return [ids]
    return np.split(ids, np.cumsum(np.frombuffer(lengths, "<i4"))[:-1])


def fault(captions: Sequence[NDArray[np.int32]], tokenizer: TokenizerInfo) -> str | None:
    """Return what is wrong with the captions of one picture, expected and got; None: nothing."""
    limit, vocabulary = tokenizer.context_length, tokenizer.vocab_size
    for i, ids in enumerate(captions):
        which = f"caption {i + 1} of {len(captions)}: " if len(captions) > 1 else ""
        if not 0 < len(ids) <= limit:
            return f"{which}expected 1 to {limit} token ids, got {len(ids)}"
        if ids.min() < 0 or ids.max() >= vocabulary:
            return (
                f"{which}expected token ids from 0 to {vocabulary - 1}, "
                f"got {ids.min()} to {ids.max()}"
            )
    return None


def stored_fault(
    tokens: bytes | None, lengths: bytes | None, tokenizer: TokenizerInfo
) -> str | None:
    """Return the `fault` of a sample's stored components; None stands for an absent component."""
    for name, content in ((TOKENS, tokens), (LENGTHS, lengths)):
        if content is not None and len(content) % 4:
            return f"{name}: expected int32 values, got {len(content)} bytes"
    if lengths is None:
        return fault(separate(tokens, None), tokenizer)
    ids, of_each = np.frombuffer(tokens or b"", "<i4"), np.frombuffer(lengths, "<i4")
    if len(of_each) == 0 or of_each.min() < 1:
        return f"expected at least 1 token id a caption, got lengths {of_each.tolist()}"
    if of_each.sum() != len(ids):
        return f"expected {of_each.sum()} token ids (lengths {of_each.tolist()}), got {len(ids)}"
    return fault(separate(tokens, lengths), tokenizer)
