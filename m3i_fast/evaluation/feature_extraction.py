"""Extracts from batches of whole pictures what the protocol measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.evaluation.features import Features, concatenate
from m3i_fast.pipelines.dataset.near_duplicates import SIDE

if TYPE_CHECKING:
    from m3i_fast.pipelines.batch import Batch


@torch.no_grad()
def collect_features(
    batches: Iterable[Batch],
    embed_images: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    embed_captions: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Features:
    """Run one encoder over batches with one view each and return its features on the CPU.

    embed_images: [B, 3, S, S] uint8 -> patch tokens [B, N, C], image embeddings [B, E] or None.
    embed_captions: token ids [B, T], counts [B] -> caption embeddings [B, E]. Without image
    embeddings Features.image and .text have no columns, and retrieval is left out.
    """
    of_batches: list[Features] = []
    for batch in batches:
        batch = batch.to(device)
        views = batch.global_views[0]
        tokens, image = embed_images(views)
        if image is None:
            image = text = tokens.new_empty(batch.batch_size, 0)
        else:
            text = embed_captions(batch.token_ids, batch.num_tokens)
        features = Features(
            encoder=tokens.float().mean(1),
            image=image,
            text=text,
            captioned=batch.num_tokens > 0,
            label=batch.label,
            group=batch.group_id,
            pixels=small_pixels(views),
        )
        of_batches.append(features.cpu())
    return concatenate(of_batches)


def small_pixels(views: Tensor) -> Tensor:  # [B, 3, S, S] uint8 -> [B, 12 * 12 * 3] fp32 in 0..1
    """Scale pictures down to 12 x 12 pixels by area."""
    return F.interpolate(views.float() / 255, size=(SIDE, SIDE), mode="area").flatten(1)


def labelled_drawings(
    batches: Iterable[Batch], most: int
) -> tuple[Tensor, Tensor, Tensor]:  # [K, 3, S, S] uint8, label [K] int64, group [K] int64
    """Return the first `most` labelled pictures of batches with one view each, on the CPU.

    Shards are written in random order, so the first pictures are a random sample.
    """
    columns: list[tuple[Tensor, ...]] = []
    missing = most
    for batch in batches:
        rows = (batch.label >= 0).nonzero()[:missing, 0]
        row = (batch.global_views[0], batch.label, batch.group_id)
        columns.append(tuple(part[rows].cpu() for part in row))
        missing -= len(rows)
        if missing == 0:
            break
    views, label, group = (torch.cat(column) for column in zip(*columns, strict=True))
    return views, label, group
