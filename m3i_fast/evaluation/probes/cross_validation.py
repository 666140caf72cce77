"""kNN and linear probe, each with its setting chosen by cross-validation on training concepts.

Legend: N examples, M queries, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from m3i_fast.evaluation.probes.accuracy import mean_by_group
from m3i_fast.evaluation.probes.knn import knn_predict, knn_predict_each
from m3i_fast.evaluation.probes.linear import TOLERANCE, LinearProbe, fit_linear

NEIGHBOURS = (1, 5, 10, 20, 50)
# Strongest first: each fit starts from the one before.
L2_STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
NUM_FOLDS = 5
TOLERANCE_OF_FOLDS = 1e-5  # of a probe that only serves the choice; scikit-learn's is 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Labelled features, dealt into folds by whole concepts."""

    features: Tensor  # [N, D]
    label: Tensor  # [N] int64
    group: Tensor  # [N] int64, the concept; its examples share the weight of one
    fold: Tensor  # [N] int64

    def __post_init__(self) -> None:
        for field in fields(self):
            if (num_rows := len(getattr(self, field.name))) != len(self.label):
                raise ValueError(
                    f"Examples.{field.name}: expected {len(self.label)} rows, as label has, "
                    f"got {num_rows}"
                )


def cross_validated_knn(
    examples: Examples, queries: Tensor
) -> tuple[Tensor, int]:  # [M, D] -> [M] int64, k
    """Return kNN's predictions [M] int64, and the k with the most hits on the folds."""
    smallest_bank = len(examples.fold) - int(torch.bincount(examples.fold).max())
    ks = [k for k in NEIGHBOURS if k <= smallest_bank]
    bank, label = examples.features, examples.label

    def predict(fit: Tensor, ask: Tensor) -> list[Tensor]:
        return list(knn_predict_each(bank[fit], label[fit], bank[ask], ks=ks))

    k = ks[_best(predict, examples)]
    return knn_predict(bank, label, queries, k=k), k


def cross_validated_linear(
    examples: Examples,
    queries: Tensor,  # [M, D]
    strengths: Sequence[float] = L2_STRENGTHS,
) -> tuple[Tensor, float]:  # [M] int64, l2
    """Return predictions of the linear probe, and the L2 with the most hits on the folds.

    strengths: as `choose_linear` takes them.
    """
    probe, l2 = choose_linear(examples, strengths)
    return probe.predict(queries), l2


def choose_linear(
    examples: Examples, strengths: Sequence[float] = L2_STRENGTHS
) -> tuple[LinearProbe, float]:
    """Return the linear probe of all examples with the L2 that has the most hits on the folds.

    strengths: of L2, the strongest first. Of equally good ones the strongest is taken.
    """
    rows, label = examples.features, examples.label

    def predict(fit: Tensor, ask: Tensor) -> list[Tensor]:
        path = _path(rows[fit], label[fit], strengths, TOLERANCE_OF_FOLDS)
        return [probe.predict(rows[ask]) for probe in path]

    best = _best(predict, examples)
    path = _path(rows, label, strengths[: best + 1], TOLERANCE)
    return path[-1], strengths[best]


def _path(
    features: Tensor, labels: Tensor, strengths: Sequence[float], tolerance: float
) -> list[LinearProbe]:
    probes: list[LinearProbe] = []
    for l2 in strengths:
        start = probes[-1] if probes else None
        probes.append(fit_linear(features, labels, l2=l2, start=start, tolerance=tolerance))
    return probes


def _best(predict: Callable[[Tensor, Tensor], list[Tensor]], examples: Examples) -> int:
    """Return the index of the setting with the most hits over the folds, weighing concepts alike.

    Concepts weigh alike because the held-out set has one picture of each.
    """
    hits: list[Tensor] = []  # a fold: [settings, n]
    concepts: list[Tensor] = []
    for fold in examples.fold.unique():
        is_asked = examples.fold == fold
        fit, ask = (~is_asked).nonzero()[:, 0], is_asked.nonzero()[:, 0]
        hits.append(torch.stack(predict(fit, ask)) == examples.label[ask])
        concepts.append(examples.group[ask])
    group = torch.cat(concepts)
    scores = [mean_by_group(row.double(), group).mean() for row in torch.cat(hits, dim=1)]
    return int(torch.stack(scores).argmax())
