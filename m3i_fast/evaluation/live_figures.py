"""Figures of a run's live model, from the columns that its ranks gathered, by their logged names.

A figure of features that are not finite is NaN. Legend: N pictures, K classes, C encoder width, E
embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.probes.knn import knn_predict
from m3i_fast.evaluation.retrieval.zero_shot import zero_shot_predict
from m3i_fast.evaluation.rows.retrieval import recall_hits

NUM_NEIGHBOURS = 20  # as DINO, arXiv 2104.14294, section 4.1
RECALL_AT = (1, 5)
_QUERIES_AT_ONCE = 256  # bounds the votes of kNN, [queries, neighbours, classes]


def knn_accuracies(
    bank: Mapping[str, Tensor], queries: Mapping[str, Tensor], device: torch.device
) -> dict[str, float]:
    """Return the share of labelled queries that DINO's weighted kNN gets right, by encoder.

    bank, queries: columns "label" [N], and features [N, C] of the trained encoder as "" and of its
    moving average as "_ema". The share is NaN where a feature is not finite, or none is labelled.
    """
    asked = queries["label"] >= 0
    label = queries["label"][asked]
    k = min(NUM_NEIGHBOURS, len(bank["label"]))
    values = {}
    for suffix in ("", "_ema"):
        if suffix not in bank:
            continue
        values[f"evaluate/knn_top1{suffix}"] = float("nan")
        if not bool(bank[suffix].isfinite().all() and queries[suffix][asked].isfinite().all()):
            continue
        rows = queries[suffix][asked].to(device).split(_QUERIES_AT_ONCE)
        own, labels = bank[suffix].to(device), bank["label"].to(device)
        predicted = torch.cat([knn_predict(own, labels, each, k=k).cpu() for each in rows])
        values[f"evaluate/knn_top1{suffix}"] = float((predicted == label).double().mean())
    return values


def classifier_accuracies(queries: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of labelled queries whose class is the first, or in the first five; or NaN.

    queries: columns "label" [N], "ranked" [N, 5] classes, [N, 1] of no more than five classes,
    which have no top 5, and "is_finite" [N], of their logits.
    """
    asked = queries["label"] >= 0
    hits = queries["ranked"][asked] == queries["label"][asked, None]
    is_finite = bool(queries["is_finite"][asked].all())
    return {
        f"evaluate/classifier_top{k}": float(hits[:, :k].any(1).double().mean())
        if is_finite
        else float("nan")
        for k in sorted({1, hits.shape[1]})
    }


def zero_shot_accuracy(
    classes: Tensor,  # [K, E] of unit length
    queries: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the share of labelled queries whose class's prompt is the most similar; NaN of NaN.

    queries: columns "label" [N] and "image" [N, E]. Of equal cosines the lower class wins.
    """
    asked = queries["label"] >= 0
    images, label = queries["image"][asked], queries["label"][asked]
    if not bool(classes.isfinite().all() and images.isfinite().all()):
        return {"evaluate/zero_shot_top1": float("nan")}
    hits = zero_shot_predict(images, classes) == label
    return {"evaluate/zero_shot_top1": float(hits.double().mean())}


def recalls(columns: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Return recall at 1 and 5 of captions by pictures and of pictures by captions; NaN of NaN.

    columns: "image", "text" [N, E], "group" [N], "captioned" [N] of a split. The gallery is all
    pictures with a caption. Ties and the memory it takes are as `rows.retrieval` has them.
    """
    asked = columns["captioned"]
    image, text, group = (columns[name][asked].numpy() for name in ("image", "text", "group"))
    is_finite = bool(np.isfinite(image).all() and np.isfinite(text).all())
    every = np.arange(len(group))
    values = {}
    for name, query, gallery in (
        ("caption_to_image", text, image),
        ("image_to_caption", image, text),
    ):
        for k in RECALL_AT:
            values[f"evaluate/{name}_recall_at_{k}"] = float("nan")
        if is_finite and len(group):
            hits = recall_hits(
                query, every, group, gallery, every, group, ks=RECALL_AT, device=device
            )
            for k, of_k in zip(RECALL_AT, hits, strict=True):
                values[f"evaluate/{name}_recall_at_{k}"] = float(of_k.mean())
    return values
