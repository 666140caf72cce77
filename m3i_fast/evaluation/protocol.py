"""What a frozen encoder is measured by, and against what: the numbers of evaluation.json.

Every setting of a measure (k of the neighbours, strength of the probe's L2) is chosen on the
training concepts, for each encoder on its own, and never on the held-out ones; the scale of the
cosines in the bound on one half of these for the other.

Item by item, every figure is also given on the hard half of the held-out items, as NAME_hard: kNN
on raw pixels gets most of those right that look like a training picture.
Legend: M held-out items, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from m3i_fast.evaluation.dense.patch_probe import DenseResult, mean_iou
from m3i_fast.evaluation.features import Features
from m3i_fast.evaluation.held_out import ENDINGS, HeldOut
from m3i_fast.evaluation.probes.accuracy import balanced_accuracy, grouped_folds, largest_class
from m3i_fast.evaluation.probes.chosen_settings import NUM_FOLDS, Examples, knn, linear
from m3i_fast.evaluation.probes.few_labels import few_label_hits
from m3i_fast.evaluation.retrieval.caption_bound import caption_bound
from m3i_fast.evaluation.retrieval.zero_shot import recall_chance, retrieval_ranks
from m3i_fast.evaluation.statistics import (
    Interval,
    figure_interval,
    hits_interval,
    holm,
    values_interval,
)
from m3i_fast.models.effective_rank import rankme

RECALLS = (
    ("caption_to_image", 1),
    ("caption_to_image", 5),
    ("image_to_caption", 5),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One source's results, item by item where there are any, so that differences can be paired.

    An item that a measure does not ask about is NaN in it, and has no overlap.
    """

    hits: dict[
        str, Tensor
    ]  # measure -> [M] fp64 in 0..1, the probability that the item was got right
    nats: dict[str, Tensor] = field(default_factory=dict)  # measure -> [M] fp64, no bounds
    overlap: dict[str, Tensor] = field(
        default_factory=dict
    )  # measure -> [M, 3, C] int64, of `overlaps`; the figure is its mean IoU
    figures: dict[str, float] = field(default_factory=dict)  # measure -> what no item has alone
    chosen: dict[str, float] = field(
        default_factory=dict
    )  # setting -> value chosen on the training concepts

    def add_scenes(self, result: DenseResult, held_out: HeldOut) -> None:
        self.hits["scene_patch_top1"] = held_out.align(result.hits, result.group, math.nan)
        self.overlap["scene_miou"] = held_out.align(result.overlap, result.group, 0)
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
    no_nats = torch.zeros(num, dtype=torch.float64).masked_fill(~heldout.captioned, math.nan)
    return Measured(
        hits={**dict.fromkeys(top1, hits), **recalls},
        nats={"caption_information_nats": no_nats} if has_captions else {},
        figures={"knn_balanced_accuracy": balanced, "linear_balanced_accuracy": balanced},
    )


def compare(measured: Mapping[str, Measured], held_out: HeldOut) -> dict[str, Any]:
    """The figures of evaluation.json: {measure: {source: value}}, `held_out_concepts`, `chosen`.

    A source appears where it was measured: `pixels` has no captions, chance no effective rank. A
    measure of items appears twice, on all held-out items and as NAME_hard.
    """
    table: dict[str, Any] = {}
    for source, result in measured.items():
        for ending in ENDINGS:
            rows = held_out.rows(ending)
            for name, values in (result.hits | result.nats).items():
                if len(asked := values[rows & ~values.isnan()]):
                    table.setdefault(name + ending, {})[source] = float(asked.mean())
            for name, overlap in result.overlap.items():
                if bool(overlap[rows].any()):
                    figure = float(mean_iou(overlap[rows].sum(0)))
                    table.setdefault(name + ending, {})[source] = figure
        for name, value in result.figures.items():
            table.setdefault(name, {})[source] = value
    table["held_out_concepts"] = len(held_out.group)
    table["chosen"] = {
        source: result.chosen for source, result in measured.items() if result.chosen
    }
    return table


def trained_minus(
    measured: Mapping[str, Measured], held_out: HeldOut
) -> dict[str, dict[str, Interval]]:
    """{measure: {source: interval}} of the trained encoder minus each other source, paired by item.

    Of every measure with items, on all of them and on the hard ones. Near-duplicates count as one
    cluster; where all items are of one there is no interval. Of a single run: nothing is said of
    other seeds. p-values are corrected for all comparisons on the same items (`holm`).
    """
    ours = measured["trained"]
    found: dict[str, dict[str, Interval]] = {}
    for ending in ENDINGS:
        family = {
            (name + ending, source): interval
            for source, theirs in measured.items()
            if source != "trained"
            for name, interval in _differences(ours, theirs, held_out, ending)
        }
        for (name, source), interval in holm(family).items():
            found.setdefault(name, {})[source] = interval
    return found


def _differences(
    ours: Measured, theirs: Measured, held_out: HeldOut, ending: str
) -> Iterator[tuple[str, Interval]]:
    """Measures that both have, with the interval of the difference."""
    kinds: tuple[tuple[dict[str, Tensor], dict[str, Tensor], Callable[..., Interval]], ...] = (
        (ours.hits, theirs.hits, hits_interval),
        (ours.nats, theirs.nats, values_interval),
        (ours.overlap, theirs.overlap, partial(figure_interval, figure=mean_iou)),
    )
    for mine, others, interval in kinds:
        for name in (name for name in mine if name in others):
            rows = held_out.rows(ending) & ~_missing(mine[name])
            cluster = held_out.cluster[rows]
            if len(cluster.unique()) > 1:
                yield name, interval(mine[name][rows], others[name][rows], cluster=cluster)


def _missing(values: Tensor) -> Tensor:  # [M, ...] -> [M] bool
    """Items that the measure does not ask about."""
    return values.isnan() if values.ndim == 1 else ~values.flatten(1).any(1)


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
) -> tuple[dict[str, Tensor], dict[str, float]]:  # [M], NaN without a caption; the scale
    if not heldout.image.shape[1]:
        return {}, {}
    has = heldout.captioned
    asked, scale = caption_bound(heldout.image[has], heldout.text[has], seed=seed)
    nats = torch.full((len(has),), math.nan, dtype=torch.float64)
    nats[has] = asked
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
