"""What a frozen encoder is measured by, and against what: the numbers of evaluation.json.

Every setting of a measure (k of the neighbours, strength of the probe's L2) is chosen on the
training concepts, for each encoder on its own, and never on the held-out ones; the scale of the
cosines in the bound on one half of these for the other.
Legend: M held-out items, G held-out concepts of scenes, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m3i_fast.evaluation.accuracy import balanced_accuracy, grouped_folds, largest_class
from m3i_fast.evaluation.caption_bound import caption_bound
from m3i_fast.evaluation.dense import DenseResult, mean_iou
from m3i_fast.evaluation.features import Features
from m3i_fast.evaluation.few_labels import few_label_hits
from m3i_fast.evaluation.probes import NUM_FOLDS, Examples, knn, linear
from m3i_fast.evaluation.statistics import Interval, difference_intervals, paired_bootstrap_of_sums
from m3i_fast.evaluation.zero_shot import recall_chance, retrieval_ranks
from m3i_fast.models.rank import rankme

RECALLS = (
    ("caption_to_image", 1),
    ("caption_to_image", 5),
    ("image_to_caption", 5),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One source's results, item by item where there are any, so that differences can be paired."""

    hits: dict[
        str, Tensor
    ]  # measure -> [M] fp64 in 0..1, the probability that the item was got right
    nats: dict[str, Tensor] = field(default_factory=dict)  # measure -> [M] fp64, no bounds
    overlap: dict[str, Tensor] = field(
        default_factory=dict
    )  # measure -> [G, 3, C] int64, of `overlaps`; the figure is its mean IoU
    figures: dict[str, float] = field(default_factory=dict)  # measure -> what no item has alone
    chosen: dict[str, float] = field(
        default_factory=dict
    )  # setting -> value chosen on the training concepts

    def add_scenes(self, result: DenseResult) -> None:
        self.hits["scene_patch_top1"] = result.hits
        self.overlap["scene_miou"] = result.overlap
        if result.l2 is not None:
            self.chosen["scene_l2"] = result.l2


def measure_all(
    encoders: Mapping[str, tuple[Features, Features]], *, baselines: bool, seed: int = 0
) -> dict[str, Measured]:
    """Measure each encoder, given as (training, held-out).

    baselines: measure chance and raw pixels as well.
    """
    measured = {who: evaluate_split(*sets, seed=seed) for who, sets in encoders.items()}
    if baselines:
        train, heldout = next(iter(encoders.values()))
        measured["chance"] = evaluate_chance(heldout)
        measured["pixels"] = evaluate_pixels(train, heldout, seed=seed)
    return measured


def evaluate_split(train: Features, heldout: Features, *, seed: int = 0) -> Measured:
    """kNN, linear probe, both from few labels, effective rank, and the captions where embedded.

    Unlabelled training items are left out of kNN and probes, items without a caption out of the
    bound. Raises ValueError when a held-out item has no label, shares its concept with another one
    or with a training item.
    """
    labelled = _checked(train, heldout)
    examples = _examples(labelled.encoder, labelled, seed)
    by_knn, k = knn(examples, heldout.encoder)
    by_probe, l2 = linear(examples, heldout.encoder)
    nats, scale = _caption_bound(heldout, seed)
    return Measured(
        hits={
            "knn_top1": (by_knn == heldout.label).double(),
            "linear_top1": (by_probe == heldout.label).double(),
            **_few_label_hits(labelled.encoder, heldout.encoder, labelled, heldout, seed),
            **_recall_hits(heldout),
        },
        nats=nats,
        figures={
            "knn_balanced_accuracy": balanced_accuracy(by_knn, heldout.label),
            "linear_balanced_accuracy": balanced_accuracy(by_probe, heldout.label),
            "effective_rank": float(rankme(heldout.encoder)),
        },
        chosen={"knn_k": k, "linear_l2": l2, **scale},
    )


def evaluate_pixels(train: Features, heldout: Features, *, seed: int = 0) -> Measured:
    """kNN on raw pixels, kNN and probe on them from few labels: what no learning at all gives.

    Errors as `evaluate_split`.
    """
    train = _checked(train, heldout)
    by_knn, k = knn(_examples(train.pixels, train, seed), heldout.pixels)
    return Measured(
        hits={
            "knn_top1": (by_knn == heldout.label).double(),
            **_few_label_hits(train.pixels, heldout.pixels, train, heldout, seed),
        },
        figures={
            "knn_balanced_accuracy": balanced_accuracy(by_knn, heldout.label),
            "effective_rank": float(rankme(heldout.pixels)),
        },
        chosen={"knn_k": k},
    )


def evaluate_chance(heldout: Features) -> Measured:
    """A classifier that always says the largest held-out class, and a gallery in random order.

    Its bound of the information is 0: that of a softmax that is even over all candidates.
    """
    guess = torch.full_like(heldout.label, largest_class(heldout.label))
    hits = (guess == heldout.label).double()
    balanced = balanced_accuracy(guess, heldout.label)
    num = len(heldout.label)
    has_captions = bool(heldout.image.shape[1])
    recalls = {
        f"{way}_recall_at_{k}": torch.full_like(hits, recall_chance(k=k, num_gallery=num))
        for way, k in RECALLS
        if has_captions
    }
    top1 = ("knn_top1", "linear_top1", "few_label_top1", "few_label_knn_top1")
    nats = {
        "caption_information_nats": torch.zeros(int(heldout.captioned.sum()), dtype=torch.float64)
    }
    return Measured(
        hits={**dict.fromkeys(top1, hits), **recalls},
        nats=nats if has_captions else {},
        figures={"knn_balanced_accuracy": balanced, "linear_balanced_accuracy": balanced},
    )


def compare(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """The figures of evaluation.json: {measure: {source: value}}, `held_out_concepts`, `chosen`.

    A source appears where it was measured: `pixels` has no captions, chance no effective rank.
    """
    table: dict[str, Any] = {}
    for source, result in measured.items():
        figures = {name: float(v.mean()) for name, v in (result.hits | result.nats).items()}
        figures |= {name: float(mean_iou(v.sum(0))) for name, v in result.overlap.items()}
        for name, value in (figures | result.figures).items():
            table.setdefault(name, {})[source] = value
    table["held_out_concepts"] = len(next(iter(measured.values())).hits["knn_top1"])
    table["chosen"] = {
        source: result.chosen for source, result in measured.items() if result.chosen
    }
    return table


def trained_minus(measured: Mapping[str, Measured]) -> dict[str, dict[str, Interval]]:
    """{measure: {source: interval}} of the trained encoder minus each other source.

    Of every measure with items: they are resampled, the same ones for both sides.
    """

    def sources(kind: str) -> dict[str, dict[str, Tensor]]:
        found = {source: getattr(result, kind) for source, result in measured.items()}
        return {
            name: {source: items[name] for source, items in found.items() if name in items}
            for name in found["trained"]
        }

    def iou(ours: Tensor, theirs: Tensor) -> Interval:
        return paired_bootstrap_of_sums(ours, theirs, mean_iou)

    def mean(ours: Tensor, theirs: Tensor) -> Interval:
        return paired_bootstrap_of_sums(ours, theirs, lambda sums: sums / len(ours))

    return {
        **difference_intervals(sources("hits")),
        **difference_intervals(sources("nats"), mean),
        **difference_intervals(sources("overlap"), iou),
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


def _examples(rows: Tensor, train: Features, seed: int) -> Examples:  # [N, D]
    fold = grouped_folds(train.group, num_folds=NUM_FOLDS, seed=seed)
    return Examples(features=rows, label=train.label, group=train.group, fold=fold)


def _few_label_hits(
    rows: Tensor,  # [N, D]
    queries: Tensor,  # [M, D]
    train: Features,
    heldout: Features,
    seed: int,
) -> dict[str, Tensor]:
    return few_label_hits(rows, train.label, train.group, queries, heldout.label, seed=seed)


def _caption_bound(
    heldout: Features, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:  # [M] of the captioned items; the scale
    if not heldout.image.shape[1]:
        return {}, {}
    has = heldout.captioned
    nats, scale = caption_bound(heldout.image[has], heldout.text[has], seed=seed)
    return {"caption_information_nats": nats}, {"caption_scale": scale}


def _recall_hits(heldout: Features) -> dict[str, Tensor]:
    if not heldout.image.shape[1]:
        return {}
    group = heldout.group
    ranks = {
        "caption_to_image": retrieval_ranks(heldout.text, heldout.image, group, group),
        "image_to_caption": retrieval_ranks(heldout.image, heldout.text, group, group),
    }
    return {f"{way}_recall_at_{k}": (ranks[way] < k).double() for way, k in RECALLS}
