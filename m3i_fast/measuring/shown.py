"""What a page shows of measured pictures: some of them, and their patches as colour.

Legend: n pictures, S side in pixels, N patches of a picture, C width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.evaluation.batches import cell_tokens
from m3i_fast.evaluation.dense.patch_pca import patch_pca
from m3i_fast.evaluation.feature_rows import Index
from m3i_fast.evaluation.rows.retrieval_examples import Sides, best_and_worst
from m3i_fast.measuring.decoding import decoded_batches
from m3i_fast.measuring.measure import Inputs
from m3i_fast.measuring.source import Source
from m3i_fast.pipelines.optional_imports import require

SIDE = 96  # pixels of a picture on the page
NUM_PCA = 6
NUM_EXAMPLES = 4  # of queries that are answered best, and as many that are answered worst
NUM_FOUND = 5


@dataclass(frozen=True, slots=True)
class Square:
    """The largest centred square of a picture, scaled to a side: [3, S, S] uint8."""

    side: int

    def __call__(self, picture: Any) -> Tensor:
        """Cut and scale an upright picture of Pillow."""
        image = require("PIL.Image")
        fitted = require("PIL.ImageOps").fit(
            picture.convert("RGB"), (self.side, self.side), image.Resampling.BICUBIC
        )
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def patch_colours(inputs: Inputs) -> dict[str, NDArray[Any]]:
    """Return `colours` [n, h, w, 3] uint8 of the patches of some pictures, and their `rows` [n].

    They are the three principal components of `patch_pca` over these pictures, whose centred
    squares are encoded whole. Empty for an encoder without a square grid of patches.
    """
    tokens = inputs.encoder.patch_tokens
    if tokens is None:
        return {}
    valid = np.flatnonzero(inputs.measured.column("valid"))
    rows = valid[np.linspace(0, len(valid) - 1, min(len(valid), NUM_PCA)).round().astype(np.int64)]
    rows, pictures = squares(inputs.source, rows, side=tokens.side)
    with torch.no_grad():
        views = torch.from_numpy(pictures).to(inputs.encoder.device)
        cells = cell_tokens(tokens.encode_views, views, tokens.num_prefix).cpu()
    if cells.shape[0] * cells.shape[1] < 3:
        return {}
    side = isqrt(cells.shape[1])
    colours = (255 * patch_pca(cells)).round().byte().view(len(rows), side, side, 3)
    return {"colours": colours.numpy(), "rows": rows}


def shown_queries(
    sides: Sides,
    query_names: Sequence[str],  # Q captions, or names of pictures
    gallery_names: Sequence[str],  # G
    device: torch.device,
) -> list[dict[str, Any]]:
    """Return the queries that are answered best, then worst, and what they find: JSON-able.

    `row` and `found_rows` are the pictures that `query` and each of `found` belong to, `rank` is
    that of the first right one, 0 = first.
    """
    found = best_and_worst(sides, num_each=NUM_EXAMPLES, k=NUM_FOUND, device=device)
    return [
        {
            "query": query_names[query],
            "row": int(sides.query_item[query]),
            "rank": int(rank),
            "found": [gallery_names[place] for place in places],
            "found_rows": sides.gallery_item[places].tolist(),
        }
        for query, places, rank in zip(found.queries, found.found, found.rank, strict=True)
    ]


def rows_of(examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> set[int]:
    """Return the rows of the pictures of `shown_queries`, by the side of retrieval."""
    every = chain.from_iterable(examples.values())
    return {row for example in every for row in (example["row"], *example["found_rows"])}


def squares(
    source: Source, rows: Iterable[int], *, side: int
) -> tuple[Index, NDArray[np.uint8]]:  # [n], [n, 3, S, S]
    """Decode some measured pictures as squares, without those that can no longer be decoded."""
    batches = decoded_batches(
        source, source.measured, Square(side), [[int(row)] for row in rows], workers=0
    )
    there = [batch for batch in batches if len(batch.rows)]
    if not there:
        return np.empty(0, np.int64), np.empty((0, 3, side, side), np.uint8)
    pictures: NDArray[np.uint8] = torch.cat([batch.pictures for batch in there]).numpy()
    return np.concatenate([batch.rows for batch in there]), pictures
