"""Accuracy from hits by item, and folds of the training concepts on which settings are chosen.

Legend: N items, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_accuracy(
    predictions: Tensor,  # [N] int64
    labels: Tensor,  # [N] int64
) -> float:
    """Return the share predicted right by class, averaged over the classes present in `labels`."""
    hits = (predictions == labels).double()
    return float(mean_by_group(hits, labels).mean())


def top_k_hits(
    logits: Tensor,  # [..., N, K]
    labels: Tensor,  # [N] int64
    *,
    k: int,
) -> Tensor:  # [..., N] bool
    """Return whether the label is among the k largest logits, as it is where K <= k.

    Of equal logits the lower class comes first. A row with NaN or infinity is a miss, so that a
    classifier that diverged scores 0.
    """
    own = logits.gather(-1, labels.expand(logits.shape[:-1])[..., None])
    is_lower = torch.arange(logits.shape[-1], device=logits.device) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & is_lower)).sum(-1)
    return (rank < k) & logits.isfinite().all(-1)


def mean_by_group(
    values: Tensor,  # [N] float
    group: Tensor,  # [N] int64
) -> Tensor:  # [G] float64
    """Return the mean of the values of each distinct group, groups in ascending order."""
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(count), dtype=torch.float64, device=values.device)
    return sums.index_add_(0, index, values.double()) / count


def largest_class(labels: Tensor) -> int:  # [N] int64
    """Return the most frequent class; the lowest of them when several are."""
    return int(torch.bincount(labels).argmax())


def grouped_folds(
    group: Tensor,  # [N] int64
    *,
    num_folds: int,
    seed: int,
) -> Tensor:  # [N] int64, the fold of each item
    """Deal whole groups into folds of equally many groups, the same folds for a seed.

    Raises ValueError when there are fewer groups than folds.
    """
    distinct, index = torch.unique(group, return_inverse=True)
    if len(distinct) < num_folds:
        raise ValueError(f"group: expected at least {num_folds} groups, got {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed))
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(distinct)) % num_folds
    return fold[index]
