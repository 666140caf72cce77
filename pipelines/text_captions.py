"""Captions of a batch: token ids as a data set stores them, or text that is tokenised here."""

from __future__ import annotations

import json
from functools import cached_property

import torch
from torch import Tensor

from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.dataset.tokenizer import Tokenizer
from m3i_fast.pipelines.samples_to_views import MadeBatch, SampleError


class TextCaptions:
    """Reads the captions of a data set's batches, as its manifest says that they are stored."""

    def __init__(self, manifest: Manifest) -> None:
        self._info = manifest.tokenizer
        kind, _, self._field = manifest.caption_member.partition(":")
        self.member = kind
        """Extension of the member of a sample that holds its captions."""

    def of(self, made: MadeBatch) -> tuple[Tensor, Tensor]:
        """Return token ids [B, T] int32, zero padded, and their number [B] int64; 0: no caption.

        A sample without the member or the field, or with null or blank text in it, has no caption.
        Raises SampleError for one whose member is not UTF-8, or not an object of JSON with text in
        the field.
        """
        if made.texts is None:
            return made.token_ids, made.num_tokens
        for index, text in enumerate(made.texts):
            try:
                caption = self._caption(text)
            except ValueError as error:
                raise SampleError(
                    sample_id=int(made.rows.sample_id[index]),
                    position=int(made.rows.positions[index]),
                    file=made.rows.path(index),
                    reason=f"{self.member}: {error}",
                ) from error
            if caption:
                ids = torch.from_numpy(self._tokenizer.encode(caption))
                made.token_ids[index, : len(ids)] = ids
                made.num_tokens[index] = len(ids)
        return made.token_ids, made.num_tokens

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_info(self._info)

    def _caption(self, stored: bytes) -> str:
        """Return the caption in a member; empty where there is none."""
        text = stored.decode()
        if text and self._field:
            try:
                fields = json.loads(text)
            except RecursionError as error:
                raise ValueError(f"expected less deeply nested JSON: {error}") from None
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object of JSON, got {type(fields).__name__}")
            value = fields.get(self._field)
            if value is None:
                return ""
            if not isinstance(value, str):
                raise ValueError(f"{self._field}: expected text, got {type(value).__name__}")
            text = value
            text.encode()  # JSON may hold halves of characters, which no tokenizer takes
        return text.strip()
