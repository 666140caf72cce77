"""kNN and linear probe from a few labelled concepts of each category.

Legend: N training items, M held-out items, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.evaluation.probes.cross_validation import (
    L2_STRENGTHS,
    Examples,
    cross_validated_knn,
    cross_validated_linear,
)

NUM_LABELS = 5  # concepts a category
NUM_DRAWS = 3
STRENGTHS = L2_STRENGTHS[:4]  # so few rows are separable: weaker L2 changes next to nothing


def few_label_hits(
    features: Tensor,  # [N, D]
    label: Tensor,  # [N] int64
    group: Tensor,  # [N] int64, the concept
    queries: Tensor,  # [M, D]
    query_label: Tensor,  # [M] int64
    *,
    seed: int = 0,
) -> dict[str, Tensor]:  # measure -> [M] fp64, the share of the draws that get the item right
    """Return hits of `few_label_top1` (linear) and `few_label_knn_top1` over NUM_DRAWS draws.

    A draw has one item of each of NUM_LABELS concepts a category, or of all that a category has. It
    depends on label, group and seed alone, so every encoder gets the same draws. k and L2 are
    chosen on folds of these few items, with one of each category in a fold.
    """
    hits: dict[str, list[Tensor]] = {"few_label_top1": [], "few_label_knn_top1": []}
    for draw in range(NUM_DRAWS):
        rows, fold = draw_labels(label, group, seed=seed * NUM_DRAWS + draw)
        few = Examples(features=features[rows], label=label[rows], group=group[rows], fold=fold)
        hits["few_label_top1"].append(
            cross_validated_linear(few, queries, STRENGTHS)[0] == query_label
        )
        hits["few_label_knn_top1"].append(cross_validated_knn(few, queries)[0] == query_label)
    return {name: torch.stack(of_draws).double().mean(0) for name, of_draws in hits.items()}


def draw_labels(
    label: Tensor,  # [N] int64
    group: Tensor,  # [N] int64
    *,
    seed: int,
) -> tuple[Tensor, Tensor]:  # [n] int64 rows, [n] int64 folds
    """Draw rows of at most NUM_LABELS concepts of each category, the k-th of each in fold k.

    Raises ValueError when no category has two concepts, so that nothing can be chosen on folds.
    """
    left = dict.fromkeys(label.unique().tolist(), NUM_LABELS)
    drawn, folds, drawn_concepts = [], [], set()
    for row in torch.randperm(len(label), generator=torch.Generator().manual_seed(seed)).tolist():
        category, concept = int(label[row]), int(group[row])
        if left[category] and concept not in drawn_concepts:
            drawn.append(row)
            folds.append(NUM_LABELS - left[category])
            drawn_concepts.add(concept)
            left[category] -= 1
    if max(folds, default=0) == 0:
        raise ValueError("label: expected a category of at least 2 concepts, got none")
    return torch.tensor(drawn), torch.tensor(folds)
