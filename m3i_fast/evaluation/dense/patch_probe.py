"""Dense features: a linear probe from the frozen features of a patch to the category it shows.

Legend: R patches, D feature width, G concepts, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.dense.scenes import IGNORED, Scenes, compose_scenes, thin_out
from m3i_fast.evaluation.probes.accuracy import grouped_folds, largest_class, mean_by_group
from m3i_fast.evaluation.probes.cross_validation import (
    L2_STRENGTHS,
    NUM_FOLDS,
    Examples,
    cross_validated_linear,
)
from m3i_fast.evaluation.statistics import Floats

NUM_SCENES = 400  # of training concepts, and as many of held-out ones
FIT_PATCHES = 2  # of a drawing that the probe is fitted to; it predicts all of them
STRENGTHS = L2_STRENGTHS[::2]  # there are more rows to fit than elsewhere
_SCENES_A_PASS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneSets:
    """The scenes, which are the same for every encoder, and the patches to fit and to predict."""

    train: Scenes
    train_fold: Tensor  # [S] int64
    fit: Tensor  # [S, N] bool
    heldout: Scenes


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseResult:
    """The results of one source by concept, in ascending order of their ids."""

    group: Tensor  # [G] int64, the concept
    hits: Tensor  # [G] fp64, share of the concept's patches whose category is right
    overlap: Tensor  # [G, 3, C] int64, of `overlaps`
    l2: float | None  # chosen on the training concepts; None where nothing is


def build_scenes(
    train: tuple[Tensor, Tensor, Tensor],  # drawings [K, 3, H, H] uint8, label [K], group [K]
    heldout: tuple[Tensor, Tensor, Tensor],
    *,
    grid: int,
    seed: int = 0,
) -> SceneSets:
    """Build scenes of training concepts, each of one fold, and of held-out concepts.

    The features of a patch may depend on all of its scene, so a scene holds concepts of one fold
    alone. Raises ValueError when a fold or the held-out set has fewer than four drawings.
    """
    drawings, label, group = train
    fold = grouped_folds(group, num_folds=NUM_FOLDS, seed=seed)
    of_folds = [
        compose_scenes(
            *(column[fold == f] for column in (drawings, label, group)),
            num_scenes=NUM_SCENES // NUM_FOLDS,
            grid=grid,
            seed=seed * (NUM_FOLDS + 1) + f,
        )
        for f in range(NUM_FOLDS)
    ]
    scenes = Scenes(
        **{
            name: torch.cat([getattr(of_fold, name) for of_fold in of_folds])
            for name in ("views", "label", "group", "place")
        }
    )
    return SceneSets(
        train=scenes,
        train_fold=torch.arange(NUM_FOLDS).repeat_interleave(NUM_SCENES // NUM_FOLDS),
        fit=thin_out(scenes, FIT_PATCHES, seed=seed),
        heldout=compose_scenes(
            *heldout, num_scenes=NUM_SCENES, grid=grid, seed=seed * (NUM_FOLDS + 1) + NUM_FOLDS
        ),
    )


@torch.no_grad()
def patch_features(
    scenes: Scenes,
    keep: Tensor,  # [S, N] bool
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Tensor:  # [R, D] fp32 on the CPU, scene by scene
    """Return the features of the kept patches by `embed`, [B, 3, H, H] uint8 -> [B, N, D]."""
    chunks = zip(scenes.views.split(_SCENES_A_PASS), keep.split(_SCENES_A_PASS), strict=True)
    return torch.cat([embed(views.to(device)).float().cpu()[kept] for views, kept in chunks])


def probe_scenes(
    sets: SceneSets, embed: Callable[[Tensor], Tensor], device: torch.device
) -> DenseResult:
    """Fit the probe to `embed`'s features of the training scenes and predict the held-out ones.

    The L2 is chosen on folds of the training concepts, each concept counting once.
    """
    fit, asked = sets.fit, sets.heldout.label != IGNORED
    examples = Examples(
        features=patch_features(sets.train, fit, embed, device),
        label=sets.train.label[fit],
        group=sets.train.group[fit],
        fold=sets.train_fold[:, None].expand_as(fit)[fit],
    )
    queries = patch_features(sets.heldout, asked, embed, device)
    predicted, l2 = cross_validated_linear(examples, queries, STRENGTHS)
    return _result(sets, predicted, l2)


def guess_scenes(sets: SceneSets) -> DenseResult:
    """Return the results of chance: the category of most held-out patches, whatever the patch."""
    label = sets.heldout.label[sets.heldout.label != IGNORED]
    return _result(sets, torch.full_like(label, largest_class(label)), None)


def overlaps(
    label: Tensor,  # [R] int64
    predicted: Tensor,  # [R] int64
    group: Tensor,  # [R] int64
    num_classes: int,
) -> Tensor:  # [G, 3, C] int64, groups in ascending order
    """Count a concept's patches by class: labelled and predicted, labelled, predicted.

    It is what mean IoU needs of the confusion matrix, and grows with C instead of C squared.
    """
    distinct, row = group.unique(return_inverse=True)
    right = predicted == label
    columns = ((row[right], label[right]), (row, label), (row, predicted))
    size = len(distinct) * num_classes
    counts = [torch.bincount(r * num_classes + c, minlength=size) for r, c in columns]
    return torch.stack(counts).view(3, len(distinct), num_classes).transpose(0, 1)


def mean_iou(overlap: Any) -> Floats:  # [..., 3, C] of `overlaps`, summed -> [...]
    """Return the mean over classes of |labelled and predicted| / |labelled or predicted|.

    A class that is neither labelled nor predicted is left out.
    """
    both, labelled, predicted = np.moveaxis(np.asarray(overlap, dtype=np.float64), -2, 0)
    either = labelled + predicted - both
    ratio = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return ratio.sum(-1) / (either > 0).sum(-1)


def _result(sets: SceneSets, predicted: Tensor, l2: float | None) -> DenseResult:
    asked = sets.heldout.label != IGNORED
    label, group = sets.heldout.label[asked], sets.heldout.group[asked]
    num_classes = int(torch.maximum(sets.train.label.max(), label.max())) + 1
    return DenseResult(
        group=group.unique(),
        hits=mean_by_group((predicted == label).double(), group),
        overlap=overlaps(label, predicted, group, num_classes),
        l2=l2,
    )
