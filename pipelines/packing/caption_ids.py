"""Captions of a picture as token ids: what is cut, and what is refused."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.packing.items import Refused

LongCaptions = Literal["cut", "refuse"]
MOST_CHARACTERS = 20_000
MOST_CHARACTERS_A_WORD = 500  # byte-pair encoding takes the square of a word's length


def caption_ids(
    tokenizer: Tokenizer, captions: tuple[str, ...], long_captions: LongCaptions
) -> tuple[tuple[NDArray[np.int32], ...], int]:
    """Encode the captions of a picture, and count those that were cut to the context's length.

    One of which nothing is left after cleaning is left out. Raises Refused for one that is too
    long, where these are refused, or is no caption at all.
    """
    encoded, num_cut = [], 0
    for text in captions:
        longest = max(map(len, text.split()), default=0)
        if len(text) > MOST_CHARACTERS or longest > MOST_CHARACTERS_A_WORD:
            raise Refused(
                f"caption: expected at most {MOST_CHARACTERS} characters, and "
                f"{MOST_CHARACTERS_A_WORD} a word, got {len(text)} and {longest}",
                "shorten it",
            )
        ids, whole = tokenizer.encode_and_count(text)
        if whole > len(ids) and long_captions == "refuse":
            raise Refused(
                f"caption: expected at most {tokenizer.context_length} token ids, got {whole}",
                "shorten it, raise --context-length, or say --long-captions cut",
            )
        if whole > 2:  # more than start and end
            encoded.append(ids)
            num_cut += whole > len(ids)
    return tuple(encoded), num_cut
