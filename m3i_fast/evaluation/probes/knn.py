"""k nearest neighbours on frozen features, as DINO evaluates them (arXiv 2104.14294, section 4.1).

Legend: N items of the bank, M queries, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
_QUERIES_A_CHUNK = 4096  # bounds the [chunk, N] similarities, not the result


def knn_predict(
    bank: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    queries: Tensor,  # [M, D]
    *,
    k: int,
    temperature: float = TEMPERATURE,
) -> Tensor:  # [M] int64
    """Return the class with the most votes among the k most similar items of the bank.

    A vote weighs exp(cosine / temperature). Of equal sums the lower class wins. Similarities are
    fp32. Raises ValueError when k is not in 1..N.
    """
    return knn_predict_each(bank, labels, queries, ks=(k,), temperature=temperature)[0]


def knn_predict_each(
    bank: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    queries: Tensor,  # [M, D]
    *,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> Tensor:  # [len(ks), M] int64
    """Return the predictions of `knn_predict` for several k, with one search."""
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise ValueError(f"k: expected values in 1..{len(bank)} (the bank's size), got {list(ks)}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")
    bank = F.normalize(bank.float(), dim=-1)
    num_classes = int(labels.max()) + 1
    chunks = [
        _vote(chunk @ bank.T, labels, ks, temperature, num_classes)
        for chunk in F.normalize(queries.float(), dim=-1).split(_QUERIES_A_CHUNK)
    ]
    return torch.cat(chunks, dim=1)


def _vote(
    cosine: Tensor,  # [m, N]
    labels: Tensor,  # [N]
    ks: Sequence[int],
    temperature: float,
    num_classes: int,
) -> Tensor:  # [len(ks), m]
    nearest_cosine, nearest = cosine.topk(max(ks), dim=1)
    votes = (nearest_cosine / temperature).exp()[..., None] * F.one_hot(
        labels[nearest], num_classes
    )  # [m, k, C]
    return torch.stack([votes[:, :k].sum(1).argmax(1) for k in ks])
