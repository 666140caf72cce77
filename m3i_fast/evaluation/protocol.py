"""What a frozen encoder is measured by, and against what: the numbers of evaluation.json.

Every setting of a measure (k of the neighbours, strength of the probe's L2) is chosen on folds of
the training concepts, for each encoder on its own, and never on the held-out ones.
Legend: N items, M held-out items, D encoder width, E embedding width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from m3i_fast.evaluation.accuracy import (
    balanced_accuracy,
    grouped_folds,
    largest_class,
    mean_by_group,
)
from m3i_fast.evaluation.knn import knn_predict, knn_predict_each
from m3i_fast.evaluation.linear import LinearProbe, fit_linear
from m3i_fast.evaluation.zero_shot import recall_chance, retrieval_ranks

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
RECALLS = (
    ("caption_to_image", 1),
    ("caption_to_image", 5),
    ("image_to_caption", 5),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What one encoder says about a set of pictures, and what is known about them."""

    encoder: Tensor  # [N, D] fp32, mean of the frozen encoder's patch tokens
    image: Tensor  # [N, E] fp32, image embedding that captions are matched with; E = 0: none
    text: Tensor  # [N, E] fp32, embedding of the picture's caption
    label: Tensor  # [N] int64, -1 = not labelled
    group: Tensor  # [N] int64, the concept
    pixels: Tensor  # [N, 12 * 12 * 3] fp32

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if len(value) != len(self.label):
                raise ValueError(
                    f"Features.{field.name}: expected {len(self.label)} rows, as label has, "
                    f"got {len(value)}"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(
                    f"Features.{field.name}: expected finite values, got NaN or infinity"
                )

    def rows(self, keep: Tensor) -> Features:  # [N] bool or [n] int64
        """The chosen rows of every field."""
        return Features(**{field.name: getattr(self, field.name)[keep] for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One source's results, item by item, so that differences can be paired."""

    hits: dict[
        str, Tensor
    ]  # measure -> [M] fp64 in 0..1, the probability that the item was got right
    balanced: dict[str, float]  # measure -> mean of the classes' accuracies
    chosen: dict[str, float]  # setting -> value chosen on the training concepts


def measure_all(
    trained: tuple[Features, Features],
    untrained: tuple[Features, Features],
    *,
    seed: int = 0,
) -> dict[str, Measured]:
    """Measure both encoders, each given as (training, held-out), raw pixels and chance."""
    return {
        "trained": evaluate_split(*trained, seed=seed),
        "untrained": evaluate_split(*untrained, seed=seed),
        "chance": evaluate_chance(trained[1]),
        "pixels": evaluate_pixels(*trained, seed=seed),
    }


def evaluate_split(train: Features, heldout: Features, *, seed: int = 0) -> Measured:
    """kNN, linear probe and, where there are embeddings, retrieval of the held-out concepts.

    Unlabelled training items are left out of kNN and probe. Raises ValueError when a held-out item
    has no label, shares its concept with another one or with a training item.
    """
    train = _checked(train, heldout)
    folds = grouped_folds(train.group, num_folds=NUM_FOLDS, seed=seed)
    knn, k = _knn(train.encoder, heldout.encoder, train, folds)
    linear, l2 = _linear(train, heldout, folds)
    return Measured(
        hits={
            "knn_top1": (knn == heldout.label).double(),
            "linear_top1": (linear == heldout.label).double(),
            **_recall_hits(heldout),
        },
        balanced={
            "knn_balanced_accuracy": balanced_accuracy(knn, heldout.label),
            "linear_balanced_accuracy": balanced_accuracy(linear, heldout.label),
        },
        chosen={"knn_k": k, "linear_l2": l2},
    )


def evaluate_pixels(train: Features, heldout: Features, *, seed: int = 0) -> Measured:
    """kNN on raw pixels: what no learning at all gives. Errors as `evaluate_split`."""
    train = _checked(train, heldout)
    folds = grouped_folds(train.group, num_folds=NUM_FOLDS, seed=seed)
    knn, k = _knn(train.pixels, heldout.pixels, train, folds)
    return Measured(
        hits={"knn_top1": (knn == heldout.label).double()},
        balanced={"knn_balanced_accuracy": balanced_accuracy(knn, heldout.label)},
        chosen={"knn_k": k},
    )


def evaluate_chance(heldout: Features) -> Measured:
    """A classifier that always says the largest held-out class, and a gallery in random order."""
    guess = torch.full_like(heldout.label, largest_class(heldout.label))
    hits = (guess == heldout.label).double()
    balanced = balanced_accuracy(guess, heldout.label)
    num = len(heldout.label)
    recalls = {
        f"{way}_recall_at_{k}": torch.full_like(hits, recall_chance(k=k, num_gallery=num))
        for way, k in RECALLS
        if heldout.image.shape[1]
    }
    return Measured(
        hits={"knn_top1": hits, "linear_top1": hits, **recalls},
        balanced={"knn_balanced_accuracy": balanced, "linear_balanced_accuracy": balanced},
        chosen={},
    )


def compare(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The figures of evaluation.json: {measure: {source: value}}, `held_out_concepts`, `chosen`.

    A source appears where it was measured, so `pixels` stands beside kNN only.
    """
    table: dict[str, Any] = {}
    for source, result in measured.items():
        for name, hits in result.hits.items():
            table.setdefault(name, {})[source] = float(hits.mean())
        for name, value in result.balanced.items():
            table.setdefault(name, {})[source] = value
    table["held_out_concepts"] = len(next(iter(measured["trained"].hits.values())))
    table["chosen"] = {
        source: result.chosen for source, result in measured.items() if result.chosen
    }
    return table


def paired_hits(measured: Mapping[str, Measured]) -> dict[str, dict[str, Tensor]]:
    """Per-item hits as {measure: {source: [M] fp64}}, the input of paired statistics."""
    names = measured["trained"].hits
    return {
        name: {source: r.hits[name] for source, r in measured.items() if name in r.hits}
        for name in names
    }


def _checked(train: Features, heldout: Features) -> Features:
    """The labelled rows of `train`, once the two sets are seen to be what the measures assume."""
    if bool((heldout.label < 0).any()):
        raise ValueError(
            f"heldout.label: expected a label on every item, got "
            f"{int((heldout.label < 0).sum())} of {len(heldout.label)} without"
        )
    distinct = torch.unique(heldout.group)
    if len(distinct) != len(heldout.group):
        raise ValueError(
            f"heldout.group: expected one picture a concept, got {len(heldout.group)} pictures "
            f"of {len(distinct)} concepts"
        )
    shared = distinct[torch.isin(distinct, train.group)]
    if len(shared):
        raise ValueError(
            f"heldout.group: expected concepts that training never saw, got {len(shared)} that it "
            f"did, the first {int(shared[0])}"
        )
    return train.rows(train.label >= 0)


def _knn(
    bank: Tensor,  # [N, D]
    queries: Tensor,  # [M, D]
    train: Features,
    folds: Tensor,  # [N]
) -> tuple[Tensor, int]:  # [M] predictions, k
    smallest_bank = len(folds) - int(torch.bincount(folds).max())
    ks = [k for k in NEIGHBOURS if k <= smallest_bank]

    def predict(fit: Tensor, ask: Tensor) -> list[Tensor]:
        return list(knn_predict_each(bank[fit], train.label[fit], bank[ask], ks=ks))

    k = ks[_best(predict, train, folds)]
    return knn_predict(bank, train.label, queries, k=k), k


def _linear(train: Features, heldout: Features, folds: Tensor) -> tuple[Tensor, float]:
    def predict(fit: Tensor, ask: Tensor) -> list[Tensor]:
        probes = _probe_path(train.encoder[fit], train.label[fit], L2_STRENGTHS)
        return [probe.predict(train.encoder[ask]) for probe in probes]

    best = _best(predict, train, folds)
    path = _probe_path(train.encoder, train.label, L2_STRENGTHS[: best + 1])
    return path[-1].predict(heldout.encoder), L2_STRENGTHS[best]


def _probe_path(features: Tensor, labels: Tensor, strengths: Sequence[float]) -> list[LinearProbe]:
    probes: list[LinearProbe] = []
    for l2 in strengths:
        start = probes[-1] if probes else None
        probes.append(fit_linear(features, labels, l2=l2, start=start))
    return probes


def _best(
    predict: Callable[[Tensor, Tensor], list[Tensor]],
    train: Features,
    folds: Tensor,  # [N]
) -> int:
    """Index of the setting that is right most often over the folds, each concept counting once.

    Concepts count once because the held-out set has one picture a concept.
    """
    hits: list[Tensor] = []  # a fold: [settings, n]
    asked: list[Tensor] = []
    for fold in range(NUM_FOLDS):
        fit, ask = (folds != fold).nonzero()[:, 0], (folds == fold).nonzero()[:, 0]
        hits.append(torch.stack(predict(fit, ask)) == train.label[ask])
        asked.append(train.group[ask])
    group = torch.cat(asked)
    scores = [mean_by_group(row.double(), group).mean() for row in torch.cat(hits, dim=1)]
    return int(torch.stack(scores).argmax())


def _recall_hits(heldout: Features) -> dict[str, Tensor]:
    if not heldout.image.shape[1]:
        return {}
    group = heldout.group
    ranks = {
        "caption_to_image": retrieval_ranks(heldout.text, heldout.image, group, group),
        "image_to_caption": retrieval_ranks(heldout.image, heldout.text, group, group),
    }
    return {f"{way}_recall_at_{k}": (ranks[way] < k).double() for way, k in RECALLS}
