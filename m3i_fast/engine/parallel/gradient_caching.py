"""Gradient caching: encoders run on some rows of the batch at a time, losses see all of its rows.

The forward pass of a chunk keeps its inputs and outputs alone and is run again in the backward
pass, so that activations take the memory of one chunk, while terms whose negatives are the whole
batch keep them all. The gradients are those of the whole batch (GradCache, arXiv 2101.06983), at
the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.text_decoder import TextDecoder
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import DenseDecoder
from m3i_fast.objectives.objective import MutualInformation

# Modules that compute each row of a batch independently, and the method that does so.
ROW_WISE: dict[type[nn.Module], str] = {
    ViT: "encode",
    InternImage: "encode_cells",
    TextEncoder: "forward",
    TextDecoder: "forward",
    DenseDecoder: "forward",
}


def encode_in_chunks(objective: MutualInformation, size: int) -> None:
    """Make every encoder and decoder of `objective` work on `size` rows at a time, in place."""
    for module in objective.modules():
        method = ROW_WISE.get(type(module))
        if method is not None:
            module.calls_apart = True  # type: ignore[assignment]
            setattr(module, method, partial(run_in_chunks, getattr(module, method), size))


def run_in_chunks(
    function: Callable[..., Tensor],  # [B, ...] each -> [B, ...]
    size: int,
    first: Tensor,  # [B, ...]
    *others: Tensor | None,  # [B, ...], or None in each chunk
) -> Tensor:
    """Apply `function` to all rows, at most `size` at a time, in chunks as equal as possible.

    The second pass drops the same branches as the first (stochastic depth).
    """
    count = -(-len(first) // size)
    if count <= 1:
        return function(first, *others)
    split = [[None] * count if rows is None else rows.tensor_split(count) for rows in others]
    chunks = zip(first.tensor_split(count), *split, strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])
