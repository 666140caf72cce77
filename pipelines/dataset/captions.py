"""Captions of a picture: how several are stored and checked, and which one a batch uses.

Legend: B samples, C most captions of a picture, T the tokenizer's context length, n token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.pipelines.dataset.tokenizer import TokenizerInfo

TOKENS, LENGTHS = "tok", "len"  # components of a sample in a shard
PADDING = -1  # pads lengths in a batch; 0 would be an empty caption


def components(captions: Sequence[NDArray[np.int32]]) -> Iterator[tuple[str, bytes]]:
    """Yield (extension, content) of a sample's captions: ids joined, and lengths of several."""
    if captions:
        yield TOKENS, np.concatenate(captions).astype("<i4").tobytes()
    if len(captions) > 1:
        yield LENGTHS, np.array([len(ids) for ids in captions], dtype="<i4").tobytes()


def count(num_bytes: Mapping[str, int]) -> int:
    """Count the captions of a sample by the sizes of its components."""
    return num_bytes[LENGTHS] // 4 if LENGTHS in num_bytes else int(TOKENS in num_bytes)


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
    ids = np.frombuffer(tokens or b"", "<i4")
    if lengths is None:
        return fault([] if tokens is None else [ids], tokenizer)
    of_each = np.frombuffer(lengths, "<i4")
    if len(of_each) == 0 or of_each.min() < 1:
        return f"expected at least 1 token id a caption, got lengths {of_each.tolist()}"
    if of_each.sum() != len(ids):
        return f"expected {of_each.sum()} token ids (lengths {of_each.tolist()}), got {len(ids)}"
    return fault(np.split(ids, np.cumsum(of_each)[:-1]), tokenizer)


def faulty_rows(
    token_ids: Tensor,  # [B, C * T] int32
    num_tokens: Tensor,  # [B] int64
    lengths: Tensor | None,  # [B, C] int32
    tokenizer: TokenizerInfo,
) -> Tensor:
    """Return which samples hold ids or lengths that no packer wrote: [B] bool."""
    bad = ((token_ids < 0) | (token_ids >= tokenizer.vocab_size)).any(1)
    if lengths is None:
        return bad | (num_tokens > tokenizer.context_length)
    total = torch.where(lengths > 0, lengths, 0).sum(1)
    several = lengths[:, 0] != PADDING
    bad |= torch.where(several, total != num_tokens, num_tokens > tokenizer.context_length)
    bad |= ((lengths < PADDING) | (lengths == 0) | (lengths > tokenizer.context_length)).any(1)
    return bad | ((lengths[:, 1:] != PADDING) & (lengths[:, :-1] == PADDING)).any(1)


def choose(
    token_ids: Tensor,  # [B, C * T] int32, one caption after the other, 0 padded
    num_tokens: Tensor,  # [B] int64, of all captions together; 0: no caption
    lengths: Tensor,  # [B, C] int32, -1 padded; nothing but padding: one caption or none
    sample_id: Tensor,  # [B] int64
    *,
    context_length: int,
    key: int | None,
) -> tuple[Tensor, Tensor]:
    """Choose one caption a sample: ([B, T] int32 token ids, [B] int64 number of them).

    Without a key the first one. With a key each with equal probability, as a function of key and
    sample_id alone. Tensors have to be on the CPU, and without `faulty_rows`.
    """
    length = torch.where(lengths > 0, lengths, 0).long()  # [B, C]
    length[:, 0] = torch.where(lengths[:, 0] == PADDING, num_tokens, length[:, 0])
    count = (length > 0).sum(1).clamp(min=1)
    chosen = torch.zeros_like(count) if key is None else draw(key, sample_id, count)
    start = (length.cumsum(1) - length).gather(1, chosen[:, None])  # [B, 1]
    kept = length.gather(1, chosen[:, None])
    place = torch.arange(context_length)
    index = (start + place).clamp(max=token_ids.shape[1] - 1)
    return token_ids.gather(1, index).masked_fill(place >= kept, 0), kept[:, 0]


def epoch_key(seed: int, epoch: int) -> int:
    """Hash seed and epoch to 64 bits, so that neighbouring ones give independent draws."""
    digest = hashlib.sha256(f"caption|{seed}|{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def draw(
    key: int,
    sample_id: Tensor,  # [B] int64
    count: Tensor,  # [B] int64, at least 1
) -> Tensor:
    """Draw uniformly in [0, count): [B] int64.

    The draw is element `sample_id` of the stream of SplitMix64 (Steele, Lea and Flood, 2014) seeded
    by the key, modulo count.
    """
    x = np.uint64(key) + (sample_id.numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return torch.from_numpy((x % count.numpy().astype(np.uint64)).astype(np.int64))
