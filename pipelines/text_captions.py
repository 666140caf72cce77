"""Captions that a data set stores as text: a thread tokenises them a batch ahead."""

from __future__ import annotations

import json
from collections import deque
from concurrent.futures import Future
from functools import cache

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer, TokenizerInfo
from m3i_fast.pipelines.dataset.manifest import Manifest
from m3i_fast.pipelines.samples_to_views import TOKENS, Backend, MadeBatch, SampleError
from m3i_fast.pipelines.threads import Cores, start_pool

AHEAD = 1  # batches, whose captions a thread tokenises while the one before them is trained on


def caption_member(manifest: Manifest) -> str:
    """Return the extension of the member of a sample that holds its captions."""
    return manifest.caption_member.partition(":")[0]


def with_captions(backend: Backend, manifest: Manifest, cores: Cores | None = None) -> Backend:
    """Return a backend whose batches have token ids, however the data set stores its captions.

    cores: of the thread that tokenises; None: where the system puts it.
    """
    if caption_member(manifest) == TOKENS:
        return backend
    return TextCaptions(backend, manifest, cores)


class TextCaptions:
    """A backend whose batches have the token ids of the captions that another one reads as text.

    A sample without the member or the field, or with null or blank text in it, has no caption.
    """

    def __init__(self, backend: Backend, manifest: Manifest, cores: Cores | None) -> None:
        self._backend = backend
        self._member, _, self._field = manifest.caption_member.partition(":")
        self._tokenizer = _tokenizer(manifest.tokenizer)
        self._thread = start_pool(1, "m3i-captions", cores)
        self._ahead: deque[Future[MadeBatch]] = deque()
        self._ended = False

    def __next__(self) -> MadeBatch:
        """Return the next batch, as `Backend` says.

        SampleError is also that of a sample whose member is not UTF-8, or not an object of JSON
        with text in the field.
        """
        while len(self._ahead) <= AHEAD and not self._ended:
            try:
                made = next(self._backend)
            except Exception as error:
                self._ended = True
                failed: Future[MadeBatch] = Future()  # its turn is after the batches before it
                failed.set_exception(error)
                self._ahead.append(failed)
            else:
                self._ahead.append(self._thread.submit(self._tokenised, made))
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop the backend's threads and that which tokenises."""
        self._backend.close()
        self._thread.shutdown(cancel_futures=True)

    def _tokenised(self, made: MadeBatch) -> MadeBatch:
        """Fill in the token ids of a batch and their numbers, which are 0 where it has text."""
        assert made.texts is not None
        token_ids, num_tokens = made.token_ids.numpy(), made.num_tokens.numpy()
        for index, text in enumerate(made.texts()):
            try:
                caption = caption_in(text, self._field)
            except ValueError as error:
                raise SampleError(
                    sample_id=int(made.rows.sample_id[index]),
                    position=int(made.rows.positions[index]),
                    file=made.rows.path(index),
                    reason=f"{self._member}: {error}",
                ) from error
            if caption:
                ids = self._tokenizer.encode(caption)
                token_ids[index, : len(ids)] = ids
                num_tokens[index] = len(ids)
        return made


def caption_in(stored: bytes, field: str) -> str:
    """Return the caption in a member, or in that field of its JSON; empty where there is none.

    Raises ValueError where the member is not UTF-8, or no object of JSON with text in the field.
    """
    text = stored.decode()
    if text and field:
        try:
            fields = json.loads(text)
        except RecursionError as error:
            raise ValueError(f"expected less deeply nested JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object of JSON, got {type(fields).__name__}")
        value = fields.get(field)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(f"{field}: expected text, got {type(value).__name__}")
        text = value
        text.encode()  # JSON may hold halves of characters, which no tokenizer takes
    return text.strip()


@cache
def _tokenizer(info: TokenizerInfo) -> Tokenizer:
    """Make a tokenizer once, though a skipped sample starts the backend again."""
    return Tokenizer.from_info(info)
