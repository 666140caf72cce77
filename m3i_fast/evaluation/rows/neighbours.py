"""Weighted k nearest neighbours over files of features, searched block by block.

The protocol of DINO (arXiv 2104.14294, section 4.1) and DINOv2 (arXiv 2304.07193): cosines of
frozen features, votes of weight exp(cosine / 0.07), k of 10, 20, 100 and 200.

Legend: N rows of the bank, M queries, C width, K classes, q rows of a block of queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.feature_rows import Index, Rows, row_blocks, unit
from m3i_fast.evaluation.probes.knn import TEMPERATURE

NEIGHBOURS = (10, 20, 100, 200)
QUERY_BLOCK, BANK_BLOCK = 2048, 8192  # rows; a block of cosines takes 64 MiB


@torch.no_grad()
def classify_by_neighbours(
    bank: Rows,  # [*, C]
    bank_rows: Index,  # [N] those of the bank that are labelled
    bank_label: Index,  # [N]
    queries: Rows,  # [*, C]
    query_rows: Index,  # [M]
    *,
    ks: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> Index:  # [len(ks), M]
    """Return the class with the most votes among the k most similar rows, for each k.

    Cosines are fp32, votes are summed in fp64; of equal sums the lower class wins. Memory is that
    of two blocks, whatever N and M are. Raises ValueError for a k that is not in 1..N.
    """
    if not ks or min(ks) < 1 or max(ks) > len(bank_rows):
        raise ValueError(f"k: expected values in 1..{len(bank_rows)}, got {list(ks)}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")
    label = torch.from_numpy(bank_label).to(device)
    num_classes = int(bank_label.max()) + 1
    predicted = np.empty((len(ks), len(query_rows)), dtype=np.int64)
    for place, block in row_blocks(queries, query_rows, size=QUERY_BLOCK, device=device):
        cosine, nearest = _search(unit(block), bank, bank_rows, k=max(ks), device=device)
        weight = (cosine.double() / temperature).exp()
        for row, k in enumerate(ks):
            votes = weight.new_zeros(len(block), num_classes)
            votes.scatter_add_(1, label[nearest[:, :k]], weight[:, :k])
            predicted[row, place] = votes.argmax(1).cpu().numpy()
    return predicted


def _search(
    queries: Tensor,  # [q, C] of unit length
    bank: Rows,
    bank_rows: Index,  # [N]
    *,
    k: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:  # [q, k] cosines, highest first; [q, k] places in bank_rows
    cosine, nearest = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0)
    nearest = nearest.to(queries.device, torch.int64)
    for place, block in row_blocks(bank, bank_rows, size=BANK_BLOCK, device=device):
        found, at = (queries @ unit(block).T).topk(min(k, len(block)), dim=1)
        cosine, nearest = torch.cat([cosine, found], 1), torch.cat([nearest, at + place.start], 1)
        cosine, kept = cosine.topk(min(k, cosine.shape[1]), dim=1)
        nearest = nearest.gather(1, kept)
    return cosine, nearest
