"""The answers to what the page asks: nearest pictures, class guesses, and where a patch is found.

Legend: N pictures, M cells of the encoder's grid, C width of a token, S pixels of its side.
"""

from __future__ import annotations

import io
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.inference.model import Model
from m3i_fast.json_files import misfit
from m3i_fast.pipelines.packing.conversion import small_picture
from m3i_fast.pipelines.threads import start_pool
from m3i_fast.report.data.page import printable
from m3i_fast.report.pictures import SMALL, inline
from m3i_fast.search.features import Described, Features, describe, view_of
from m3i_fast.search.index import Index
from m3i_fast.search.pictures import About, Pictures, decode

logger = logging.getLogger(__name__)

NUM_RESULTS, MOST_RESULTS = 24, 96
NUM_GUESSES = 5
MOST_LETTERS = 1000  # of words
KEPT_QUERIES, KEPT_TOKENS = 32, 2 * MOST_RESULTS
PATCH_BATCH = 16  # pictures that the encoder sees at once for their patches
THUMBNAIL_SIDE, PICTURE_SIDE = 288, 1600
KEPT_THUMBNAILS = 2048
Request = dict[str, Any]
Answer = dict[str, Any]

Key = TypeVar("Key")
Value = TypeVar("Value")


class Forgotten(LookupError):
    """A query that was asked too long ago, or a picture that is not there."""


class Encoded(NamedTuple):
    """A picture for a browser."""

    content: bytes
    kind: str  # MIME type


@dataclass(frozen=True, slots=True)
class Query:
    """A picture that was searched for."""

    identity: str
    view: NDArray[np.uint8]  # [S, S, 3]
    described: Described
    row: int | None  # of the data; None: given by the user


class Kept(OrderedDict[Key, Value]):
    """The values that were used last, of a bounded number."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def keep(self, key: Key, value: Value) -> None:
        """Add a value, and drop those that were used longest ago."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > self._most:
            self.popitem(last=False)


class Answers:
    """Searches some pictures by one model; its methods may be called by any thread.

    The model computes in one thread, so that requests take their turn. Pictures are decoded in
    others, so that nobody waits for the decoding of another's picture. Methods raise ValueError for
    a request that cannot be answered, and `Forgotten` if it names something that is not there.
    """

    def __init__(
        self,
        model: Model,
        pictures: Pictures,
        features: Features,
        *,
        model_name: str,
        num_threads: int = 1,
    ) -> None:
        """model_name: as the page calls the model. num_threads: that decode pictures."""
        self._model, self._pictures, self._features = model, pictures, features
        self._model_name = model_name
        self._by_features = Index(features.mean)
        self._by_words = None if features.image is None else Index(features.image)
        self._classes, self._class_of = _classes(model, pictures, features)
        if model.caption is not None:
            _ = model.tokenizer  # so that a missing library is told at the start
        self._queries: Kept[str, Query] = Kept(KEPT_QUERIES)
        self._tokens: Kept[int, Tensor] = Kept(KEPT_TOKENS)
        self._readers = start_pool(num_threads, "m3i-pictures")
        self._model_thread = start_pool(1, "m3i-search")
        self.thumbnail = lru_cache(KEPT_THUMBNAILS)(self._thumbnail)

    def close(self) -> None:
        """Stop the threads that decode pictures and compute."""
        self._readers.shutdown(cancel_futures=True)
        self._model_thread.shutdown(cancel_futures=True)

    def about(self) -> Answer:
        """Return what the page says of model and data, and which of its controls there are."""
        counts = np.bincount(
            self._class_of[self._features.readable & (self._class_of >= 0)],
            minlength=len(self._classes),
        )
        named = [
            (name, int(n), i) for i, (name, n) in enumerate(zip(self._classes, counts, strict=True))
        ]
        readable = int(self._features.readable.sum())
        notes = list(map(printable, self._pictures.notes))
        if readable < len(self._features.readable):
            notes.append(f"{len(self._features.readable) - readable:,} pictures cannot be read")
        return {
            "model": printable(self._model_name),
            "data": printable(self._pictures.name),
            "version": self._pictures.digest[:12],
            "pictures": readable,
            "words": self._by_words is not None,
            "guesses": self._features.guess is not None,
            "classes": [
                {"id": i, "name": printable(name), "pictures": n}
                for name, n, i in sorted(named)
                if n
            ],
            "by_guess": not (self._pictures.label >= 0).any(),
            "grid": math.isqrt(len(self._features.position_mean)),
            "size": self._model.transform.preprocessing.size,
            "results": NUM_RESULTS,
            "letters": MOST_LETTERS,
            "pixels": MAX_PIXELS,
            "notes": notes,
        }

    # ---- Searching -------------------------------------------------------------------------------

    def add_picture(self, content: bytes) -> Answer:
        """Encode a picture of the user, and return the query to search for."""
        started = time.perf_counter()
        query = self._new_query(content, None)
        return {"query": self._told(query), "encode_ms": _ms(started)}

    def search(self, request: Request) -> Answer:
        """Return the pictures nearest to words, to a picture that was added, or to one of the data.

        request: words (a string), query (the id of one), or row; class (a number or null) and num.
        """
        shape = {"words?": str, "query?": str, "row?": int, "class?": (int, None), "num?": int}
        _expect(request, shape)
        asked = [name for name in ("words", "query", "row") if name in request]
        if len(asked) != 1:
            raise ValueError(f"expected one of words, query and row, got {asked or 'none'}")
        num = request.get("num", NUM_RESULTS)
        if not 1 <= num <= MOST_RESULTS:
            raise ValueError(f"num: expected 1 to {MOST_RESULTS}, got {num}")
        among = self._among(request.get("class"))
        started, query, note = time.perf_counter(), None, ""
        if "words" in request:
            index, vector, note = self._in_turn(self._words, request["words"])
        else:
            query = self._asked(request)
            index, vector = self._by_features, query.described.mean[0]
            if query.row is not None:
                among[query.row] = False
        encode_ms, started = _ms(started), time.perf_counter()
        rows, similarity = self._in_turn(index.nearest, vector, num, among)
        search_ms = _ms(started)
        results = [
            self._result(*each) for each in zip(rows.tolist(), similarity.tolist(), strict=True)
        ]
        return {
            "query": None if query is None else self._told(query),
            "results": results,
            "searched": int(among.sum()),
            "encode_ms": encode_ms,
            "search_ms": search_ms,
            "note": note,
        }

    def _in_turn(self, call: Callable[..., Value], *arguments: object) -> Value:
        """Call a function in the thread of the model, which alone changes what is kept."""
        return self._model_thread.submit(call, *arguments).result()

    def _asked(self, request: Request) -> Query:
        """Return the query that is named, or make one of a picture of the data."""
        if "row" in request:
            return self._new_query(self._content(request["row"]), request["row"])
        query = self._queries.get(request["query"])
        if query is None:
            raise Forgotten("this picture was searched too long ago: give it again")
        return self._in_turn(self._keep, query)

    def _new_query(self, content: bytes, row: int | None) -> Query:
        view = self._readers.submit(view_of, self._model, content).result()
        pixels = view[0].permute(1, 2, 0).contiguous().numpy()
        described = self._in_turn(describe, self._model, view)
        return self._in_turn(self._keep, Query(secrets.token_hex(8), pixels, described, row))

    def _keep(self, query: Query) -> Query:
        self._queries.keep(query.identity, query)
        return query

    def _words(self, words: str) -> tuple[Index, Tensor, str]:
        """Return where words are searched, their embedding, and what to say of them."""
        if self._by_words is None:
            raise ValueError("this model was trained without captions: search by a picture")
        if not words.strip():
            raise ValueError("type some words")
        if len(words) > MOST_LETTERS:
            raise ValueError(f"expected at most {MOST_LETTERS} letters, got {len(words)}")
        words = printable(words)
        tokenizer = self._model.tokenizer
        count, most = tokenizer.encode_and_count(words)[1], tokenizer.context_length
        note = f"The model reads the first {most} tokens of {count}." if count > most else ""
        return self._by_words, self._model.encode_text(words)[0].cpu(), note

    def _among(self, number: int | None) -> NDArray[np.bool_]:  # [N]
        """Return which pictures are searched; number: of their class."""
        if number is None:
            return self._features.readable.copy()
        if not 0 <= number < len(self._classes):
            raise ValueError(f"class: expected 0 to {len(self._classes) - 1}, got {number}")
        return self._features.readable & (self._class_of == number)

    def _result(self, row: int, similarity: float) -> Answer:
        name, captions = self._named(row)
        label = int(self._pictures.label[row])
        guess = None
        if self._features.guess is not None and self._features.probability is not None:
            number = int(self._features.guess[row])
            guess = _guess(self._model.class_names[number], self._features.probability[row])
        return {
            "row": row,
            "similarity": round(similarity, 4),
            "name": printable(name),
            "captions": [printable(caption) for caption in captions],
            "label": printable(self._pictures.class_names[label]) if label >= 0 else None,
            "guess": guess,
        }

    def _named(self, row: int) -> About:
        """Return a picture's name and captions, or why they cannot be read: others can."""
        try:
            return self._pictures.about(row)
        except (ValueError, OSError) as error:
            logger.warning("picture %d: %s", row, error)
            return About(f"picture {row} cannot be read: {error}", ())

    def _told(self, query: Query) -> Answer:
        """Return what the page shows of a query: the picture as the model sees it, and guesses."""
        guesses = []
        if query.described.logits is not None:
            best = (
                query.described.logits[0]
                .softmax(-1)
                .topk(min(NUM_GUESSES, query.described.logits.shape[1]))
            )
            for probability, number in zip(
                best.values.tolist(), best.indices.tolist(), strict=True
            ):
                guesses.append(_guess(self._model.class_names[number], probability))
        return {
            "id": query.identity,
            "row": query.row,
            "picture": inline(query.view, "").uri,
            "guesses": guesses,
        }

    # ---- Patches ---------------------------------------------------------------------------------

    def patches(self, request: Request) -> Answer:
        """Return how similar each patch of some pictures is to one of the query.

        The cosine is that of the tokens about the mean of all pictures at their cells, as in
        `m3i-fast evaluate`'s correspondence: a code of the place alone would find the same place
        everywhere. request: query (its id), cell (0 to M - 1, row by row) and rows. Of a picture
        that can no longer be read the answer has None.
        """
        _expect(request, {"query": str, "cell": int, "rows": [int]})
        query = self._asked({"query": request["query"]})
        cell, rows = request["cell"], request["rows"]
        if not 0 <= cell < len(self._features.position_mean):
            raise ValueError(
                f"cell: expected 0 to {len(self._features.position_mean) - 1}, got {cell}"
            )
        if not 1 <= len(rows) <= MOST_RESULTS:
            raise ValueError(f"rows: expected 1 to {MOST_RESULTS} of them, got {len(rows)}")
        for row in rows:
            self._expect_picture(row)
        started = time.perf_counter()
        kept = {row: self._tokens.get(row) for row in rows}
        missing = [row for row, tokens in kept.items() if tokens is None]
        read = zip(missing, self._readers.map(self._view, missing), strict=True)
        views = {row: view for row, view in read if view is not None}
        similarity = self._in_turn(self._compare, query, cell, kept, views)
        return {
            "similarity": [similarity[row] for row in rows],
            "encoded": len(views),
            "ms": _ms(started),
        }

    def _compare(
        self, query: Query, cell: int, kept: dict[int, Tensor | None], views: dict[int, Tensor]
    ) -> dict[int, list[float] | None]:
        """Return the similarity of each row's patches to one of the query.

        kept: tokens of the rows, about their means and of unit length. views: of the rows whose
        tokens are to be computed. A row with neither can no longer be read.
        """
        found = {row: tokens for row, tokens in kept.items() if tokens is not None}
        for first in range(0, len(views), PATCH_BATCH):
            rows = [*views][first : first + PATCH_BATCH]
            described = describe(self._model, torch.cat([views[row] for row in rows]))
            cells = self._about_mean(described.cells)
            found |= {row: tokens.clone() for row, tokens in zip(rows, cells, strict=True)}
        for row, tokens in found.items():
            self._tokens.keep(row, tokens)
        wanted = self._about_mean(query.described.cells[0])[cell]
        return dict.fromkeys(kept) | {
            row: [round(v, 3) for v in (tokens @ wanted).tolist()] for row, tokens in found.items()
        }

    def _view(self, row: int) -> Tensor | None:  # [1, 3, S, S] uint8
        try:
            return view_of(self._model, self._content(row))
        except (Forgotten, ValueError) as error:
            logger.warning("picture %d: %s", row, error)
            return None

    def _about_mean(self, cells: Tensor) -> Tensor:  # [..., M, C] -> the same, unit length
        return F.normalize(cells - self._features.position_mean, dim=-1)

    # ---- Pictures for the browser ----------------------------------------------------------------

    def _thumbnail(self, row: int) -> Encoded:
        """Return the centred square of a picture, which is what the model sees of it."""
        picture = _opened(self._content(row), THUMBNAIL_SIDE)
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return _encoded(picture)

    def picture(self, row: int) -> Encoded:
        """Return a whole picture, scaled down where it is large."""
        picture = _opened(self._content(row), PICTURE_SIDE)
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        return _encoded(picture)

    def _content(self, row: int) -> bytes:
        """Return the encoded picture of a row; raises `Forgotten` where there is none."""
        self._expect_picture(row)
        try:
            return self._pictures.read(row)
        except OSError as error:
            raise Forgotten(f"picture {row} is gone: {error.strerror or error}") from error

    def _expect_picture(self, row: int) -> None:
        if not 0 <= row < len(self._features.readable) or not self._features.readable[row]:
            raise Forgotten(f"there is no picture {row}")


def _classes(
    model: Model, pictures: Pictures, features: Features
) -> tuple[tuple[str, ...], NDArray[np.int64]]:  # names, [N]
    """Return the classes to filter by: of the data, or where they have no labels, as guessed."""
    if (pictures.label >= 0).any() or features.guess is None:
        return pictures.class_names, pictures.label
    return model.class_names, features.guess.astype(np.int64)


def _guess(name: str, probability: float) -> Answer:
    return {"name": printable(name), "probability": round(float(probability), 4)}


def _expect(request: Request, shape: Any) -> None:
    if wrong := misfit(request, shape):
        raise ValueError(wrong)


def _opened(content: bytes, least_side: int) -> Any:
    """Decode a picture to Pillow's, a large JPEG at a fraction of its size, which is quicker."""
    if content.startswith(b"\xff\xd8"):
        return small_picture(content, max_pixels=MAX_PIXELS, least_side=least_side)
    return Image.fromarray(decode(content))


def _encoded(picture: Any) -> Encoded:
    """Encode a picture for a browser, a small one without loss."""
    kind, options = ("PNG", {}) if max(picture.size) < SMALL else ("JPEG", {"quality": 88})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Encoded(buffer.getvalue(), f"image/{kind.lower()}")


def _ms(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 2)
