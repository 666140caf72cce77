"""Measures of patch tokens: whether a place in the picture is found again in another crop.

Legend: B pictures, S side in pixels, H and W those of a picture, N patches, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m3i_fast.evaluation.batches import cell_tokens
from m3i_fast.evaluation.dense.correspondence import RADIUS, measure_correspondence, two_crops
from m3i_fast.measuring.decoding import decoded_batches
from m3i_fast.measuring.measure import Figure, Inputs, Measured, MeasureSettings, mean_figure
from m3i_fast.pipelines.dataset.pictures import rgb_pixels

Pair = tuple[Tensor, Tensor, Tensor]  # 2 x [B, 3, S, S] uint8, boxes [B, 2, 5]


def correspondence_takes(settings: MeasureSettings) -> str:
    """Say how often every picture is encoded."""
    return "two crops of each measured picture, each of them encoded twice"


def correspondence(inputs: Inputs) -> Measured:
    """Search patches of one crop in another, over every measured picture that can be decoded."""
    tokens = inputs.encoder.patch_tokens
    assert tokens is not None, "an encoder without patches is refused"
    rows = np.flatnonzero(inputs.measured.column("valid"))

    def embed(views: Tensor) -> Tensor:  # [B, 3, S, S] uint8 -> [B, N, C]
        return cell_tokens(tokens.encode, tokens.normalise(views), tokens.num_prefix)

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
