"""The tokenizer: CLIP's byte-pair encoding, with all or only the first of its merges."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.optional_imports import require

if TYPE_CHECKING:
    from torch import Tensor

CLIP_NUM_MERGES = 49152 - 256 - 2
_CLEAN = re.compile("[ -%'-~]*")  # ASCII without control characters and &: cleaning changes nothing
_WORDS_KEPT = 1 << 16
MOST_LETTERS = 500
"""Letters of a word beyond which it is cut: byte-pair encoding takes their square and more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerInfo:
    """A manifest's record of the tokenizer, enough to build it again and to refuse another."""

    num_merges: int | None
    context_length: int
    vocab_size: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for JSON."""
        return asdict(self)


class Tokenizer:
    """open_clip's SimpleTokenizer with its first `num_merges` merges (None: all; 49,408 ids).

    Fewer merges give a smaller vocabulary, in which a new word is split into pieces known from
    training. Ids are those of SimpleTokenizer on the truncated merges file. context_length: number
    of ids a caption is truncated to, at least 3. Raises ValueError for a number out of range.
    """

    def __init__(self, num_merges: int | None = None, context_length: int = 77) -> None:
        if num_merges is not None and not 0 <= num_merges <= CLIP_NUM_MERGES:
            raise ValueError(
                f"num_merges: expected None or 0 to {CLIP_NUM_MERGES}, got {num_merges}"
            )
        if context_length < 3:
            raise ValueError(
                f"context_length: expected at least 3 (start, one token, end), got {context_length}"
            )
        open_clip = require("open_clip.tokenizer")
        with gzip.open(open_clip.default_bpe()) as file:
            lines = file.read().decode("utf-8").split("\n")
        kept = CLIP_NUM_MERGES if num_merges is None else num_merges
        merges = "\n".join(lines[: kept + 1])
        self._bpe = open_clip.SimpleTokenizer(io.BytesIO(gzip.compress(merges.encode("utf-8"))))
        self._merges_sha256 = hashlib.sha256(merges.encode("utf-8")).hexdigest()
        self._word_ids = lru_cache(_WORDS_KEPT)(self._encode_word)
        self.num_merges = num_merges
        self.context_length = context_length

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[int | None, int]]:
        """Pickle what it is built from: workers of a DataLoader build their own."""
        return Tokenizer, (self.num_merges, self.context_length)

    @classmethod
    def from_info(cls, info: TokenizerInfo) -> Tokenizer:
        """Build the tokenizer of a manifest; ValueError where this machine's merges differ."""
        tokenizer = cls(info.num_merges, info.context_length)
        if tokenizer.fingerprint != info.fingerprint:
            raise ValueError(
                f"tokenizer: expected {info.fingerprint} (manifest), got {tokenizer.fingerprint}"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of different token ids."""
        return int(self._bpe.vocab_size)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of all pieces, whose characters stand for bytes; `</w>` ends a word."""
        return dict(self._bpe.encoder)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces in the order in which they are merged."""
        return list(self._bpe.bpe_ranks)

    @cached_property
    def fingerprint(self) -> str:
        """Digest (sha256) of the merges and of every setting that ids depend on."""
        settings = {
            "algorithm": "open_clip.SimpleTokenizer",
            "clean": "lower",
            "context_length": self.context_length,
            "merges_sha256": self._merges_sha256,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def info(self) -> TokenizerInfo:
        """Record for a manifest."""
        return TokenizerInfo(
            num_merges=self.num_merges,
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            fingerprint=self.fingerprint,
        )

    def encode(self, text: str) -> NDArray[np.int32]:
        """Encode a caption as [n] ids: start, tokens and end, truncated to n <= context_length.

        Of a longer text only the words are encoded that may have a place.
        """
        return self.encode_and_count(text, self.context_length - 2)[0]

    def encode_and_count(
        self, text: str, most_words: int | None = None
    ) -> tuple[NDArray[np.int32], int]:
        """Encode a caption as `encode`, and count the ids that it has without truncation.

        most_words: words that are encoded and counted, of one id or more each; None: all.
        """
        body = self._ids(text, most_words)
        start, end = self._bpe.sot_token_id, self._bpe.eot_token_id
        ids = np.array([start, *body[: self.context_length - 2], end], dtype=np.int32)
        return ids, len(body) + 2

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Encode captions as open_clip's tokenizers: [B, context_length] int64, zero padded."""
        import torch  # which the rest of this module does without

        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        token_ids = torch.zeros(len(rows), self.context_length, dtype=torch.int64, device="cpu")
        for row, ids in zip(token_ids, rows, strict=True):
            row[: len(ids)] = torch.from_numpy(ids)
        return token_ids

    def _ids(self, text: str, most_words: int | None) -> list[int]:
        """Return the ids of SimpleTokenizer, of the first words."""
        cleaned = text.lower() if _CLEAN.fullmatch(text) else self._bpe.clean_fn(text)
        words = self._bpe.pat.findall(cleaned)[:most_words]
        return [i for word in words for i in self._word_ids(word[:MOST_LETTERS])]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Return the ids of a word that is clean, as SimpleTokenizer finds them."""
        as_bytes = "".join(self._bpe.byte_encoder[byte] for byte in word.encode())
        return tuple(self._bpe.encoder[piece] for piece in self._bpe.bpe(as_bytes).split(" "))

    def decode(self, token_ids: NDArray[np.int32]) -> str:
        """Decode one row of ids to its caption in lower case, without start, end and padding."""
        special = (self._bpe.sot_token_id, self._bpe.eot_token_id)
        ids = [int(i) for i in token_ids]
        if special[1] in ids:
            ids = ids[: ids.index(special[1])]
        return str(self._bpe.decode([i for i in ids if i not in special])).strip()
