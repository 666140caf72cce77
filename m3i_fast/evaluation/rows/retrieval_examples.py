"""Queries that retrieval answers best and worst, and what they find.

Legend: Q queries, G gallery items, E width of an embedding, n examples, k results of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.feature_rows import Index, Rows, row_blocks, unit
from m3i_fast.evaluation.rows.retrieval import QUERY_BLOCK, Floats, cosine_blocks


class Sides(NamedTuple):
    """Queries and gallery: the rows of each, and the picture that each belongs to."""

    queries: Rows
    query_rows: Index  # [Q]
    query_item: Index  # [Q]
    gallery: Rows
    gallery_rows: Index  # [G]
    gallery_item: Index  # [G]


@dataclass(frozen=True, slots=True)
class RetrievalExamples:
    """Some queries, the best answered first, and what each finds."""

    queries: Index  # [n] places among the queries
    found: Index  # [n, k] places in the gallery, the most similar first
    rank: Index  # [n] of the best item of the query's own, 0 = first; a tie counts against it


@torch.no_grad()
def best_and_worst(
    sides: Sides, *, num_each: int, k: int, device: torch.device | str = "cpu"
) -> RetrievalExamples:
    """Return the `num_each` queries of the largest and of the smallest margin, and what they find.

    The margin is the cosine of the best item of the query's own minus that of the best other one,
    in fp64. Of equal margins the earlier query comes first, of equal cosines the earlier item.
    """
    order = np.argsort(-_margins(sides, device), kind="stable")
    chosen = order
    if len(order) > 2 * num_each:
        chosen = np.concatenate([order[:num_each], order[-num_each:]])
    blocks = [*_cosines(sides, chosen, device)]
    cosine = torch.cat([block for block, _ in blocks], 1)
    is_own = torch.cat([own for _, own in blocks], 1)
    best = cosine.masked_fill(~is_own, -torch.inf).amax(1, keepdim=True)
    return RetrievalExamples(
        queries=chosen,
        found=cosine.argsort(dim=1, descending=True, stable=True)[:, :k].cpu().numpy(),
        rank=(~is_own & (cosine >= best)).sum(1).cpu().numpy(),
    )


def _margins(sides: Sides, device: torch.device | str) -> Floats:  # [Q]
    margins = np.empty(len(sides.query_rows))
    for start in range(0, len(margins), QUERY_BLOCK):
        places = np.arange(start, min(start + QUERY_BLOCK, len(margins)))
        own, other = (torch.full((len(places),), -torch.inf, dtype=torch.float64) for _ in range(2))
        for cosine, is_own in _cosines(sides, places, device):
            own = torch.maximum(own, _best(cosine, is_own))
            other = torch.maximum(other, _best(cosine, ~is_own))
        margins[places] = (own - other).numpy()
    return margins


def _best(cosine: Tensor, among: Tensor) -> Tensor:  # [q, g] each -> [q] on the CPU
    return cosine.masked_fill(~among, -torch.inf).amax(1).cpu()


def _cosines(
    sides: Sides, places: Index, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    rows = sides.query_rows[places]
    ((_, queries),) = row_blocks(sides.queries, rows, size=len(rows), device=device)
    own, items = (
        torch.from_numpy(of).to(device) for of in (sides.query_item[places], sides.gallery_item)
    )
    return cosine_blocks(unit(queries.double()), own, sides.gallery, sides.gallery_rows, items)
