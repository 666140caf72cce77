"""Retrieval of captions by pictures and of pictures by captions, with several captions a picture.

Recall at K as Karpathy and Fei-Fei (arXiv 1412.2306, section 4.2) and CLIP report it: the share of
pictures that have any caption of their own among the K nearest, and of captions that have their
picture among them. Items at equal distance are in a random order, so a hit among them counts as
often as chance would have it: an encoder that maps all to one point has the recall of chance.

Legend: N pictures, M captions, Q queries, G gallery items, E width of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.evaluation.feature_rows import Index, Rows, row_blocks, unit

RECALL_AT = (1, 5, 10)
QUERY_BLOCK, GALLERY_BLOCK = 1024, 4096  # rows; a block of cosines in fp64 takes 32 MiB
TIE = 1e-9  # cosines in fp64 of equal embeddings are nearer than this, those of others are not

Floats = NDArray[np.float64]


@torch.no_grad()
def recall_hits(
    queries: Rows,
    query_rows: Index,  # [Q]
    query_item: Index,  # [Q] the picture that each belongs to
    gallery: Rows,
    gallery_rows: Index,  # [G]
    gallery_item: Index,  # [G]
    *,
    ks: Sequence[int] = RECALL_AT,
    device: torch.device | str = "cpu",
) -> Floats:  # [len(ks), Q] the probability that an item of the query's own is among the first k
    """Return the expected hits at k of each query, block by block in fp64.

    Raises ValueError where a query has no item of its own in the gallery.
    """
    missing = np.setdiff1d(query_item, gallery_item)
    if len(missing):
        raise ValueError(f"gallery: expected an item of every query, got none of {missing[0]}")
    items = torch.from_numpy(gallery_item).to(device)
    hits = np.empty((len(ks), len(query_rows)))
    for place, block in row_blocks(queries, query_rows, size=QUERY_BLOCK, device=device):
        own = torch.from_numpy(query_item[place]).to(device)
        counts = _count(unit(block.double()), own, gallery, gallery_rows, items)
        for row, k in enumerate(ks):
            hits[row, place] = expected_hit(*counts, k=k).cpu().numpy()
    return hits


def cosine_blocks(
    queries: Tensor,  # [q, E] fp64 of unit length
    own: Tensor,  # [q] int64, the picture that each belongs to
    gallery: Rows,
    gallery_rows: Index,  # [G]
    items: Tensor,  # [G] int64
) -> Iterator[tuple[Tensor, Tensor]]:  # [q, g] cosines; [q, g] whether the item is the query's own
    """Yield the cosines of queries with the gallery, block by block."""
    for place, block in row_blocks(
        gallery, gallery_rows, size=GALLERY_BLOCK, device=queries.device
    ):
        yield queries @ unit(block.double()).T, own[:, None] == items[place][None]


def _count(
    queries: Tensor,  # [q, E] fp64 of unit length
    own: Tensor,  # [q]
    gallery: Rows,
    gallery_rows: Index,  # [G]
    items: Tensor,  # [G]
) -> tuple[Tensor, Tensor, Tensor]:  # [q] int64 each: better, tied, right ones among the tied
    """Count the gallery items above and level with the best of each query's own, in two passes."""
    sides = (queries, own, gallery, gallery_rows, items)
    best = queries.new_full((len(queries),), -torch.inf)
    for cosine, is_own in cosine_blocks(*sides):
        best = torch.maximum(best, cosine.masked_fill(~is_own, -torch.inf).amax(1))
    better, tied, right = (torch.zeros_like(own) for _ in range(3))
    for cosine, is_own in cosine_blocks(*sides):
        above = cosine - best[:, None]
        is_tied = above.abs() <= TIE
        better += (above > TIE).sum(1)
        tied += is_tied.sum(1)
        right += (is_tied & is_own).sum(1)
    return better, tied, right


def expected_hit(
    better: Tensor,  # [q] int64, items that are nearer than the best right one
    tied: Tensor,  # [q] int64, items as near as that, itself included
    right: Tensor,  # [q] int64, right ones among the tied, at least 1
    *,
    k: int,
) -> Tensor:  # [q] fp64
    """Return the probability of a right item among the first k, the tied ones in a random order.

    It is 1 - C(tied - right, places) / C(tied, places), for the places that better items leave.
    """
    places = (k - better).clamp(min=0)
    missed = torch.ones(len(better), dtype=torch.float64, device=better.device)
    for drawn in range(k):
        left = (tied - drawn).clamp(min=1)
        wrong = (tied - right - drawn).clamp(min=0)
        missed = torch.where(drawn < places, missed * wrong / left, missed)
    return 1 - missed
