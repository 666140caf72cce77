"""kNN and linear probe, each with its setting chosen on folds of the training concepts.

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
L2_STRENGTHS = (
    1.0,
    0.3,
    0.1,
    0.03,
    0.01,
    0.003,
    0.001,
)  # strongest first: each fit starts from the last
NUM_FOLDS = 5
TOLERANCE_OF_FOLDS = 1e-5  # of a probe that only helps to choose; scikit-learn's is 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Labelled features, dealt into folds by whole concepts."""

    features: Tensor  # [N, D]
    label: Tensor  # [N] int64
    group: Tensor  # [N] int64, the concept: of several examples, each counts a part
    fold: Tensor  # [N] int64

    def __post_init__(self) -> None:
        for field in fields(self):
            if (found := len(getattr(self, field.name))) != len(self.label):
                raise ValueError(
                    f"Examples.{field.name}: expected {len(self.label)} rows, as label has, "
                    f"got {found}"
                )


def knn(examples: Examples, queries: Tensor) -> tuple[Tensor, int]:  # [M, D] -> [M] int64, k
    """Predictions of kNN, and the k of NEIGHBOURS that is right most often over the folds."""
    smallest_bank = len(examples.fold) - int(torch.bincount(examples.fold).max())
    ks = [k for k in NEIGHBOURS if k <= smallest_bank]
    bank, label = examples.features, examples.label

    def predict(fit: Tensor, ask: Tensor) -> list[Tensor]:
        return list(knn_predict_each(bank[fit], label[fit], bank[ask], ks=ks))

    k = ks[_best(predict, examples)]
    return knn_predict(bank, label, queries, k=k), k


def linear(
    examples: Examples,
    queries: Tensor,  # [M, D]
    strengths: Sequence[float] = L2_STRENGTHS,
) -> tuple[Tensor, float]:  # [M] int64, l2
    """Predictions of the linear probe, and the L2 that is right most often over the folds.

    `strengths`: strongest first. Of equally good ones the strongest.
    """
    rows, label = examples.features, examples.label

    def predict(fit: Tensor, ask: Tensor) -> list[Tensor]:
        path = _path(rows[fit], label[fit], strengths, TOLERANCE_OF_FOLDS)
        return [probe.predict(rows[ask]) for probe in path]

    best = _best(predict, examples)
    path = _path(rows, label, strengths[: best + 1], TOLERANCE)
    return path[-1].predict(queries), strengths[best]


def _path(
    features: Tensor, labels: Tensor, strengths: Sequence[float], tolerance: float
) -> list[LinearProbe]:
    probes: list[LinearProbe] = []
    for l2 in strengths:
        start = probes[-1] if probes else None
        probes.append(fit_linear(features, labels, l2=l2, start=start, tolerance=tolerance))
    return probes


def _best(predict: Callable[[Tensor, Tensor], list[Tensor]], examples: Examples) -> int:
    """Index of the setting that is right most often over the folds, each concept counting once.

    Concepts count once because the held-out set counts them once.
    """
    hits: list[Tensor] = []  # a fold: [settings, n]
    asked: list[Tensor] = []
    for fold in examples.fold.unique():
        fit, ask = (part.nonzero()[:, 0] for part in (examples.fold != fold, examples.fold == fold))
        hits.append(torch.stack(predict(fit, ask)) == examples.label[ask])
        asked.append(examples.group[ask])
    group = torch.cat(asked)
    scores = [mean_by_group(row.double(), group).mean() for row in torch.cat(hits, dim=1)]
    return int(torch.stack(scores).argmax())
