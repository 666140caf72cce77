"""What a trained run is worth on held-out data, in counts by cluster of which figures are made.

    styles   linear probe with all labels on frozen features of held-out concepts, and more
    earth    linear probe of frozen patches to land cover, on tiles of held-out blocks

A cluster is what is drawn anew by an interval: near-duplicate concepts, or a block of 15 degrees.
Found of clusters add up, and the figure is a function of the sum: [hits, items] give their ratio,
[3, K] of `overlaps` the mean IoU.

Legend: T tiles, N patches of a tile, K classes of land cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from m3i_fast.benchmarks.methods.run import pack, unpack
from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import (
    Evaluation,
    build_untrained,
    evaluate,
    evaluate_untrained,
    load_objective,
)
from m3i_fast.engine.precision.arithmetic import autocast, resolve_device
from m3i_fast.evaluation.dense.correspondence import patch_pixels
from m3i_fast.evaluation.dense.patch_probe import STRENGTHS, mean_iou, overlaps
from m3i_fast.evaluation.feature_extraction import collect_features
from m3i_fast.evaluation.features import Features
from m3i_fast.evaluation.held_out import describe_held_out
from m3i_fast.evaluation.probes.accuracy import grouped_folds
from m3i_fast.evaluation.probes.cross_validation import (
    NUM_FOLDS,
    Examples,
    cross_validated_linear,
)
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.near_duplicates import COMPARED_SIZE
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sources.earth import BLOCK
from m3i_fast.pipelines.sources.earth_maps import COVERS
from m3i_fast.pipelines.sources.styles import OTHER_STYLES, SEEN_STYLE

Found = dict[str, dict[str, Any]]
"""Measure -> {"cluster": of each item, "hits": as of `pack`}, or {"cluster": C ids, "counts": C x 3
x K}; what json can hold."""
EARTH_HEIGHT = 2700  # pixels of Blue Marble from pole to pole
FIT_PATCHES = 16  # of a tile that the probe is fitted to: neighbours are alike
# Land cover of 1 % or more of the land tiles' pixels: of the others a fold has a block or none.
COMMON = tuple(
    COVERS.index(name)
    for name in (
        "water",
        "evergreen needleleaf forest",
        "evergreen broadleaf forest",
        "deciduous broadleaf forest",
        "mixed forest",
        "open shrubland",
        "woody savanna",
        "savanna",
        "grassland",
        "cropland",
        "snow and ice",
        "barren",
    )
)
_HITS = ("knn_top1", "linear_top1", "few_label_top1", "caption_to_image_recall_at_5")
_PICTURES_A_PASS = 128

# ---- Styles --------------------------------------------------------------------------------------


def measure_styles(run: Path, whole: Path, *, tune: bool = False) -> Found:
    """Measure a run on held-out concepts, drawn in the styles that it trained on and in another.

    whole: the run's data with all labels and captions. tune: measure on that split alone.
    """
    cfg = TrainConfig.load(run / "config.json")
    if tune:
        return _by_cluster(evaluate(run, split="tune", baselines=False, data=whole), "trained")
    seen = evaluate(run, split=SEEN_STYLE, baselines=False, data=whole)
    unseen = evaluate(run, split="heldout", baselines=False, data=whole)
    held_out, objective = seen.held_out, load_objective(run, cfg)
    of_group = dict(zip(held_out.group.tolist(), held_out.cluster.tolist(), strict=True))
    return {
        **every_style(objective, cfg, whole),
        **_by_cluster(seen, "trained"),
        **{f"{name}_unseen_style": of for name, of in _by_cluster(unseen, "trained").items()},
        **across_styles(objective, cfg, whole, of_group),
    }


def measure_untrained_styles(cfg: TrainConfig) -> dict[str, Found]:
    """Measure what runs of `cfg` start from, and raw pixels, on the run's data."""
    evaluation = evaluate_untrained(cfg, split=SEEN_STYLE)
    untrained = every_style(build_untrained(cfg), cfg, cfg.data.path)
    return {
        "untrained": {**untrained, **_by_cluster(evaluation, "untrained")},
        "pixels": _by_cluster(evaluation, "pixels"),
    }


def every_style(objective: Any, cfg: TrainConfig, whole: Path) -> Found:
    """Probe the class of every held-out drawing in every style that was trained on.

    The linear probe is that of `protocol.evaluate_split`, fitted to all training drawings with all
    labels, a concept counting once. The hard half is that of the drawings.
    """
    num_styles = len(read_manifest(whole).settings["styles"])

    def pictures(*splits: str, size: int | None = None) -> Iterator[Batch]:
        for split in splits:
            for batch in _pictures(cfg, whole, split, size=size, variants=True):
                yield replace(batch, group_id=batch.group_id // num_styles)  # the concept, of each

    held_out = describe_held_out(
        pictures(SEEN_STYLE, OTHER_STYLES, size=COMPARED_SIZE),
        pictures("train", size=COMPARED_SIZE),
    )
    train, asked = (
        _features(objective, cfg, pictures(*splits))
        for splits in (("train",), (SEEN_STYLE, OTHER_STYLES))
    )
    examples = Examples(
        features=train.encoder,
        label=train.label,
        group=train.group,
        fold=grouped_folds(train.group, num_folds=NUM_FOLDS, seed=0),
    )
    predicted, _ = cross_validated_linear(examples, asked.encoder)
    hits = (predicted == asked.label).double()
    return {
        f"linear_top1_every_style{ending}": by_item(hits[rows], held_out.cluster[rows])
        for ending in ("", "_hard")
        for rows in [held_out.rows(ending)]
    }


def _pictures(
    cfg: TrainConfig, whole: Path, split: str, *, size: int | None = None, variants: bool = False
) -> Iterator[Batch]:
    """Yield one picture a concept, or all of them, in the shards' order."""
    return evaluation_batches(
        whole,
        split,
        image_size=size or cfg.vision.image_size,
        batch_size=_PICTURES_A_PASS,
        representatives_only=not variants,
        max_pixels=cfg.data.max_pixels,
        device_id=0 if resolve_device(cfg.device).type == "cuda" else None,
        bucket_fields_of=cfg.data,
    )


def _features(objective: Any, cfg: TrainConfig, pictures: Iterator[Batch]) -> Features:
    device = resolve_device(cfg.device)
    with autocast(cfg.precision, device):
        return collect_features(pictures, objective.embed_images, objective.embed_captions, device)


def _by_cluster(evaluation: Evaluation, who: str) -> Found:
    """Sum the item-wise hits of a source over clusters, on all items and on the hard half."""
    held_out, hits = evaluation.held_out, evaluation.measured[who].hits
    return {
        name + ending: by_item(hits[name][rows], held_out.cluster[rows])
        for ending in ("", "_hard")
        for rows in [held_out.rows(ending)]
        for name in _HITS
        if name in hits
    }


def by_item(
    hits: Tensor,  # [M] fp64 in 0..1, NaN for an item that was not asked
    cluster: Tensor,  # [M] int64
) -> dict[str, Any]:
    """Return what a row keeps of a measure that is a mean over items."""
    return {"cluster": cluster.tolist(), "hits": pack(hits.tolist())}


def across_styles(
    objective: Any, cfg: TrainConfig, whole: Path, cluster_of: Mapping[int, int]
) -> Found:
    """Find each held-out concept's drawing of the new style by that of a style trained on.

    A hit: of all held-out drawings in the new style the nearest one, by the cosine of the mean
    patch token, is the concept's own. cluster_of: of the concepts as `SEEN_STYLE` numbers them.
    """
    num_styles = len(read_manifest(whole).settings["styles"])
    splits = (SEEN_STYLE, "heldout")
    seen, new = (_features(objective, cfg, _pictures(cfg, whole, split)) for split in splits)
    tokens = [F.normalize(found.encoder.double(), dim=1) for found in (seen, new)]
    concepts = [found.group // num_styles for found in (seen, new)]  # ids count the styles of each
    nearest = (tokens[0] @ tokens[1].T).argmax(1)
    hits = (concepts[1][nearest] == concepts[0]).double()
    hits[~torch.isin(concepts[0], concepts[1])] = math.nan  # its plainest drawing is another one
    cluster = torch.tensor([cluster_of[int(group)] for group in seen.group])
    return {"across_styles_top1": by_item(hits, cluster)}


# ---- Earth ---------------------------------------------------------------------------------------


def measure_earth(run: Path, masks: Path, part: str) -> Found:
    """Measure a run on the tiles of a part of `masks`, "validation" or "tune"."""
    cfg = TrainConfig.load(run / "config.json")
    return measure_patches(_patch_tokens(load_objective(run, cfg), cfg), cfg, masks, part)


def measure_untrained_earth(cfg: TrainConfig, masks: Path, part: str) -> dict[str, Found]:
    """Measure what runs of `cfg` start from, and raw pixels."""
    return {
        "untrained": measure_patches(_patch_tokens(build_untrained(cfg), cfg), cfg, masks, part),
        "pixels": measure_patches(
            partial(patch_pixels, grid=cfg.vision.grid), cfg, masks, part, STRENGTHS[:-1]
        ),
    }


def measure_patches(
    embed: Callable[[Tensor], Tensor],  # [B, 3, S, S] uint8 -> [B, N, D]
    cfg: TrainConfig,
    masks: Path,
    part: str,
    strengths: Sequence[float] = STRENGTHS,
) -> Found:
    """Fit a linear probe from patches to their land cover, and count its hits in each block.

    It is fitted to patches of training tiles that do not overlap, where every tile has its land
    cover whatever share of the labels training saw; a block counts once. The class of a patch is
    that of most of its pixels. strengths: as of `choose_linear`; a probe of raw pixels, which are
    nearly collinear, does not converge at the weakest one.
    """
    pictures, covers, block = read_tiles(masks, "training", cfg.vision.image_size)
    label = patch_cover(covers, cfg.vision.grid)
    rng = torch.Generator().manual_seed(0)
    kept = torch.rand(label.shape, generator=rng).argsort(1)[:, :FIT_PATCHES]
    rows = torch.arange(len(label))[:, None]
    group = block[:, None].expand(-1, FIT_PATCHES).flatten()
    examples = Examples(
        features=_embedded(embed, pictures)[rows, kept].flatten(0, 1),
        label=label[rows, kept].flatten(),
        group=group,
        fold=grouped_folds(group, num_folds=NUM_FOLDS, seed=0),
    )
    pictures, covers, block = read_tiles(masks, part, cfg.vision.image_size)
    label = patch_cover(covers, cfg.vision.grid)
    queries = _embedded(embed, pictures).flatten(0, 1)
    predicted, _ = cross_validated_linear(examples, queries, strengths)
    group = block[:, None].expand_as(label).flatten()
    hits = (predicted.view_as(label) == label).double().mean(1)  # share of a tile's patches
    counts = overlaps(label.flatten(), predicted, group, len(COVERS))
    return {
        "patch_miou": {"cluster": block.unique().tolist(), "counts": counts.tolist()},
        "patch_top1": by_item(hits, block),
    }


def read_tiles(
    masks: Path, part: str, tile: int
) -> tuple[Tensor, Tensor, Tensor]:  # [T, 3, S, S] uint8, [T, S, S] uint8, [T] int64
    """Return the tiles of a part that do not overlap, the land cover of pixels, and the block."""
    open_image = require("PIL.Image", extra="eval").open
    pictures, covers, blocks = [], [], []
    for path in sorted((masks / "images" / part).iterdir()):
        corner = np.array([int(each) for each in path.stem.split("-")])
        if part == "training" and (corner % tile).any():
            continue
        pictures.append(np.asarray(open_image(path)))
        covers.append(np.asarray(open_image(masks / "annotations" / part / path.name)) - 1)
        row, column = (corner + tile // 2) // (EARTH_HEIGHT * BLOCK // 180)
        blocks.append(int(row) * (360 // BLOCK) + int(column))
    if not pictures:
        raise FileNotFoundError(f"{masks}/images/{part}: expected tiles, got none")
    views = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return views, torch.from_numpy(np.stack(covers)), torch.tensor(blocks)


def patch_cover(covers: Tensor, grid: int) -> Tensor:  # [T, S, S] uint8 -> [T, N] int64
    """Return the class of most pixels of each patch; of equals, the first one of COVERS."""
    side = covers.shape[-1] // grid
    patches = covers.unflatten(2, (grid, side)).unflatten(1, (grid, side)).transpose(2, 3)
    pixels = patches.flatten(3).flatten(1, 2).long()  # [T, N, pixels]
    counts = torch.zeros(*pixels.shape[:2], len(COVERS), dtype=torch.int64)
    return counts.scatter_add_(2, pixels, torch.ones_like(pixels)).argmax(2)


@torch.no_grad()
def _embedded(embed: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:  # -> [T, N, D] fp32
    return torch.cat([embed(part).float().cpu() for part in views.split(_PICTURES_A_PASS)])


def _patch_tokens(objective: Any, cfg: TrainConfig) -> Callable[[Tensor], Tensor]:
    device = resolve_device(cfg.device)

    def embed(views: Tensor) -> Tensor:
        with autocast(cfg.precision, device):
            tokens: Tensor = objective.embed_images(views.to(device))[0]
        return tokens

    return embed


# ---- Figures -------------------------------------------------------------------------------------


def counts_by_cluster(found: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the clusters of a measure [C] in ascending order, and their counts [C, ...].

    [C, 2] are hits and items, without those that were not asked; [C, 3, K] as of `overlaps`.
    """
    cluster = np.asarray(found["cluster"])
    if "counts" in found:
        return cluster, np.asarray(found["counts"], np.float64)
    hits = np.asarray(unpack(found["hits"]))
    asked = ~np.isnan(hits)
    distinct, row = np.unique(cluster[asked], return_inverse=True)
    sums = [np.bincount(row, weights) for weights in (hits[asked], np.ones(int(asked.sum())))]
    return distinct, np.stack(sums, 1)


def figure(counts: Any) -> Any:  # [..., n, 2] or [..., n, 3, K] of n clusters -> [...]
    """Return what the summed counts of clusters say: a share of hits, or the mean IoU of COMMON."""
    summed = np.asarray(counts, np.float64)
    if summed.shape[-1] == 2:
        hits, items = np.moveaxis(summed.sum(-2), -1, 0)
        return hits / items
    return mean_iou(summed.sum(-3)[..., COMMON])
