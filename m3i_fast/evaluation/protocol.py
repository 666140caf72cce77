"""Protocol of the evaluation: the measures of a frozen encoder, and the figures of evaluation.json.

The settings of a measure (k of the neighbours, strength of the probe's L2) are chosen on the
training concepts, for each encoder on its own, and never on the held-out ones. The scale of the
cosines in the bound is chosen on one half of the held-out concepts for the other half.

Every item-wise figure is also given on the hard half of the held-out items, as NAME_hard, since kNN
on raw pixels is right on most items that look like a training picture. Legend: M held-out items, C
classes.
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
from m3i_fast.evaluation.probes.cross_validation import (
    NUM_FOLDS,
    Examples,
    cross_validated_knn,
    cross_validated_linear,
)
from m3i_fast.evaluation.probes.few_labels import few_label_hits
from m3i_fast.evaluation.retrieval.caption_bound import MIN_PAIRS, caption_bound
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
class SourceResults:
    """The results of one source, item by item where possible, so that differences can be paired.

    An item that a measure does not cover is NaN in it, and has no overlap.
    """

    # measure -> [M] fp64 in 0..1, the probability that the item is right
    hits: dict[str, Tensor]
    # measure -> [M] fp64, unbounded
    nats: dict[str, Tensor] = field(default_factory=dict)
    # measure -> [M, 3, C] int64, of `overlaps`; the figure is its mean IoU
    overlap: dict[str, Tensor] = field(default_factory=dict)
    # measure -> a figure that is not a mean over items
    figures: dict[str, float] = field(default_factory=dict)
    # setting -> value chosen on the training concepts
    chosen: dict[str, float] = field(default_factory=dict)

    def add_scenes(self, result: DenseResult, held_out: HeldOut) -> None:
        """Add the results of the scenes, aligned with the held-out items."""
        self.hits["scene_patch_top1"] = held_out.align(result.hits, result.group, math.nan)
        self.overlap["scene_miou"] = held_out.align(result.overlap, result.group, 0)
        if result.l2 is not None:
            self.chosen["scene_l2"] = result.l2


def measure_all(
    encoders: Mapping[str, tuple[Features, Features]], *, baselines: bool, seed: int = 0
) -> dict[str, SourceResults]:
    """Measure each encoder, given as (training, held-out) features.

    baselines: also measure chance and raw pixels. Raises ValueError as `evaluate_split` does.
    """
    measured = {who: evaluate_split(*sets, seed=seed) for who, sets in encoders.items()}
    if baselines:
        train, heldout = next(iter(encoders.values()))
        measured["chance"] = evaluate_chance(heldout)
        measured["pixels"] = evaluate_pixels(train, heldout, seed=seed)
    return measured


def evaluate_split(train: Features, heldout: Features, *, seed: int = 0) -> SourceResults:
    """Measure kNN, linear probe, both from few labels, effective rank, and captions if embedded.

    Unlabelled training items are left out of kNN and probes, items without a caption out of the
    bound. Raises ValueError when a held-out item has no label, or shares its concept with another
    held-out item or a training item.
    """
    labelled = _checked(train, heldout)
    examples = _examples(labelled.encoder, labelled, seed)
    by_knn, k = cross_validated_knn(examples, heldout.encoder)
    by_probe, l2 = cross_validated_linear(examples, heldout.encoder)
    nats, scale = _caption_bound(heldout, seed)
    return SourceResults(
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


def evaluate_pixels(train: Features, heldout: Features, *, seed: int = 0) -> SourceResults:
    """Measure kNN, and kNN and probe from few labels, on raw pixels, which no learning has shaped.

    Raises ValueError as `evaluate_split` does.
    """
    train = _checked(train, heldout)
    by_knn, k = cross_validated_knn(_examples(train.pixels, train, seed), heldout.pixels)
    return SourceResults(
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


def evaluate_chance(heldout: Features) -> SourceResults:
    """Measure a classifier that predicts the largest held-out class, and a gallery in random order.

    Its bound of the information is 0, that of a softmax that is even over all candidates.
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
    return SourceResults(
        hits={**dict.fromkeys(top1, hits), **recalls},
        nats={"caption_information_nats": no_nats} if has_captions else {},
        figures={"knn_balanced_accuracy": balanced, "linear_balanced_accuracy": balanced},
    )


def tabulate_figures(measured: Mapping[str, SourceResults], held_out: HeldOut) -> dict[str, Any]:
    """Return the figures of evaluation.json: {measure: {source: value}}, and chosen settings.

    A source is listed where it was measured: `pixels` has no captions, `chance` no effective rank.
    An item-wise measure is listed twice, over all held-out items and as NAME_hard. The other keys
    are `held_out_concepts` and `chosen`.
    """
    table: dict[str, Any] = {}
    for source, result in measured.items():
        for ending in ENDINGS:
            rows = held_out.rows(ending)
            for name, values in (result.hits | result.nats).items():
                if len(covered := values[rows & ~values.isnan()]):
                    table.setdefault(name + ending, {})[source] = float(covered.mean())
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
    measured: Mapping[str, SourceResults], held_out: HeldOut
) -> dict[str, dict[str, Interval]]:
    """Return {measure: {source: interval}} of the trained encoder minus each other source.

    It covers every item-wise measure, on all items and on the hard ones. Near-duplicates count as
    one cluster; where all items are in one cluster there is no interval. The intervals are those of
    a single run and do not cover other seeds. p-values are corrected for all comparisons on the
    same items (`holm`).
    """
    ours = measured["trained"]
    intervals: dict[str, dict[str, Interval]] = {}
    for ending in ENDINGS:
        family = {
            (name + ending, source): interval
            for source, theirs in measured.items()
            if source != "trained"
            for name, interval in _differences(ours, theirs, held_out, ending)
        }
        for (name, source), interval in holm(family).items():
            intervals.setdefault(name, {})[source] = interval
    return intervals


def _differences(
    ours: SourceResults, theirs: SourceResults, held_out: HeldOut, ending: str
) -> Iterator[tuple[str, Interval]]:
    """Yield the measures that both sources have, with the interval of their difference."""
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
    """Return which items a measure does not cover."""
    return values.isnan() if values.ndim == 1 else ~values.flatten(1).any(1)


def _checked(train: Features, heldout: Features) -> Features:
    """Return the labelled rows of `train` once both sets satisfy what the measures assume."""
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
    has = heldout.captioned
    if not heldout.image.shape[1] or int(has.sum()) < MIN_PAIRS:
        return {}, {}
    nats_of_captioned, scale = caption_bound(heldout.image[has], heldout.text[has], seed=seed)
    nats = torch.full((len(has),), math.nan, dtype=torch.float64)
    nats[has] = nats_of_captioned
    return {"caption_information_nats": nats}, {"caption_scale": scale}


def _recall_hits(heldout: Features) -> dict[str, Tensor]:
    if not heldout.image.shape[1] or not bool(heldout.captioned.any()):
        return {}
    group = heldout.group
    ranks = {
        "caption_to_image": retrieval_ranks(heldout.text, heldout.image, group, group),
        "image_to_caption": retrieval_ranks(heldout.image, heldout.text, group, group),
    }
    return {f"{way}_recall_at_{k}": (ranks[way] < k).double() for way, k in RECALLS}
