"""Measures of patch tokens: correspondence of two crops, and linear segmentation of a folder.

Legend: B pictures, S side in pixels, H and W those of a picture, N patches, C width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.batches import cell_tokens
from m3i_fast.evaluation.dense.correspondence import RADIUS, measure_correspondence, two_crops
from m3i_fast.evaluation.dense.segmentation import (
    BATCH_SIZE,
    NUM_STEPS,
    evaluate_segmentation,
    segmentation_scores,
    train_segmentation,
)
from m3i_fast.evaluation.dense.segmentation_folder import (
    Split,
    open_folder,
    training_batches,
    whole_pictures,
)
from m3i_fast.measuring.decoding import decoded_batches
from m3i_fast.measuring.encoders.encoder import PatchTokens
from m3i_fast.measuring.measure import (
    Figure,
    Inputs,
    Measured,
    MeasureSettings,
    mean_figure,
    steps_on,
)
from m3i_fast.pipelines.dataset.pictures import rgb_pixels

Pair = tuple[Tensor, Tensor, Tensor]  # 2 x [B, 3, S, S] uint8, boxes [B, 2, 5]


# ---- Correspondence ------------------------------------------------------------------------------


def correspondence_takes(settings: MeasureSettings) -> str:
    """Say how often every picture is encoded."""
    return "two crops of each measured picture, each of them encoded twice"


def correspondence(inputs: Inputs) -> Measured:
    """Search patches of one crop in another, over every measured picture that can be decoded."""
    tokens = _patch_tokens(inputs)
    rows = np.flatnonzero(inputs.measured.column("valid"))

    def embed(views: Tensor) -> Tensor:  # [B, 3, S, S] uint8 -> [B, N, C]
        return cell_tokens(tokens.encode_views, views, tokens.num_prefix)

    found = measure_correspondence(
        embed, lambda: pairs(inputs, side=tokens.side), inputs.settings.device
    )
    queried = (found.num_queries > 0).numpy()
    if not queried.any():
        raise ValueError(
            f"--measures correspondence: expected a picture with a patch that is not plain, got "
            f"none of {len(rows)} in {inputs.measured.split.name}"
        )
    share = found.share.double().numpy()
    return Measured(
        figures=(
            mean_figure("patches found", share[queried], rows[queried]),
            Figure(name="chance", value=found.mean_chance),
        ),
        settings={
            "side": tokens.side,
            "radius_patches": RADIUS,
            "queries": int(found.num_queries.sum()),
            "seed": inputs.settings.seed,
        },
        arrays={"share": share, "rows": rows},
    )


def pairs(inputs: Inputs, *, side: int) -> Iterator[Pair]:
    """Yield two crops of each picture that can be decoded, and their boxes, a batch at a time.

    Crops depend on the seed, the picture's row and its size, and neither on batches nor on the
    encoder. Whole pictures are held one at a time.
    """
    settings = inputs.settings
    rows = np.flatnonzero(inputs.measured.column("valid")).tolist()
    alone = [[row] for row in rows]  # pictures of different sizes make no batch
    batches = decoded_batches(
        inputs.source, inputs.measured.split, whole_picture, alone, workers=settings.workers
    )
    cut: list[Pair] = []
    for batch in batches:
        positions = torch.from_numpy(batch.rows)
        cut.append(two_crops([*batch.pictures], positions, size=side, seed=settings.seed))
        if len(cut) == settings.batch_size:
            yield _batch(cut)
            cut = []
    if cut:
        yield _batch(cut)


def whole_picture(picture: Any) -> Tensor:
    """Return the pixels of a picture of Pillow: [H, W, 3] uint8."""
    return torch.from_numpy(rgb_pixels(picture))


def _batch(cut: list[Pair]) -> Pair:
    first, second, boxes = (torch.cat(column) for column in zip(*cut, strict=True))
    return first, second, boxes


# ---- Segmentation --------------------------------------------------------------------------------


def segmentation_takes(settings: MeasureSettings) -> str:
    """Say how many steps the head is trained, and on what."""
    steps = _segmentation_steps(settings)
    return f"{settings.segmentation}: {steps:,} steps of {BATCH_SIZE} crops (--segmentation-steps)"


def segmentation(inputs: Inputs) -> Measured:
    """Train DINOv2's linear head on a folder's training part, and measure its validation part."""
    tokens, settings = _patch_tokens(inputs), inputs.settings
    assert settings.segmentation is not None, "segmentation without a folder is refused"
    train = open_folder(settings.segmentation, "training")
    validation = open_folder(settings.segmentation, "validation", num_classes=train.num_classes)
    batch_size = min(BATCH_SIZE, len(train.pairs))
    steps = _segmentation_steps(settings)
    common = {"num_classes": train.num_classes, "num_prefix": tokens.num_prefix}
    head, loss = train_segmentation(
        tokens.encode_views,
        training_batches(
            train,
            size=tokens.side,
            batch_size=batch_size,
            seed=settings.seed,
            num_workers=settings.workers,
        ),
        **common,
        num_steps=steps,
        seed=settings.seed,
        device=settings.device,
    )
    confusion = evaluate_segmentation(
        tokens.encode_views,
        head,
        whole_pictures(validation, size=tokens.side, num_workers=settings.workers)(0),
        **common,
        window=tokens.side,
        device=settings.device,
    )
    scores = segmentation_scores(confusion)
    return Measured(
        figures=(
            Figure(name="mean IoU", value=scores.mean_iou),
            Figure(name="pixel accuracy", value=scores.pixel_accuracy),
        ),
        settings={
            "folder": settings.segmentation.name,
            "window": tokens.side,
            "steps": steps,
            "batch_size": batch_size,
            "classes": train.num_classes,
            "ignores_zero": train.ignores_zero,
            "train": len(train.pairs),
            "measured": len(validation.pairs),
            "seed": settings.seed,
        },
        details={"iou": [None if iou != iou else iou for iou in scores.iou.tolist()]},
        arrays={"confusion": confusion.numpy(), "loss": loss.numpy()},
    )


def expect_segmentation(root: Path) -> None:
    """Raise FileNotFoundError unless a folder has pictures with masks in both of its parts."""
    for split in get_args(Split):
        open_folder(root, split, num_classes=1)  # classes are counted later


def _segmentation_steps(settings: MeasureSettings) -> int:
    return steps_on(settings.device, settings.training.segmentation_steps, NUM_STEPS)


def _patch_tokens(inputs: Inputs) -> PatchTokens:
    tokens = inputs.encoder.patch_tokens
    assert tokens is not None, "an encoder without patches is refused"
    return tokens
