"""From batches of whole pictures to what the protocol measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.evaluation.protocol import Features

if TYPE_CHECKING:
    from m3i_fast.pipelines.batch import Batch

PIXEL_SIDE = 12


@torch.no_grad()
def collect_features(
    batches: Iterable[Batch],
    embed_images: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    embed_captions: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
) -> Features:
    """Run one encoder over batches with one view each.

    embed_images: [B, 3, S, S] uint8 -> patch tokens [B, N, C], image embeddings [B, E] or None;
    embed_captions: token ids [B, T], counts [B] -> caption embeddings [B, E]. Both stay on the
    CPU in the result.
    Without image embeddings Features.image and .text have no columns, and retrieval is left out.
    """
    columns: list[tuple[Tensor, ...]] = []
    for batch in batches:
        batch = batch.to(device)
        views = batch.global_views[0]
        tokens, image = embed_images(views)
        if image is None:
            image = text = tokens.new_empty(batch.batch_size, 0)
        else:
            text = embed_captions(batch.token_ids, batch.num_tokens)
        pixels = F.interpolate(views.float() / 255, size=(PIXEL_SIDE, PIXEL_SIDE), mode="area")
        row = (tokens.float().mean(1), image, text, batch.label, batch.group_id, pixels.flatten(1))
        columns.append(tuple(part.cpu() for part in row))
    encoder, image, text, label, group, pixels = (torch.cat(c) for c in zip(*columns, strict=True))
    return Features(
        encoder=encoder, image=image, text=text, label=label, group=group, pixels=pixels
    )
