"""Gradient caching: encoders work on a part of the batch at a time, losses see all of it.

A chunk's forward pass keeps its inputs and outputs alone and is run again when its gradient is due,
so that the memory of activations is that of one chunk, while terms whose negatives are the batch
keep them all. The gradients are those of the whole batch (GradCache, arXiv 2101.06983), for a
second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.text import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import DenseDecoder
from m3i_fast.objectives.objective import MutualInformation

# What works on each row of a batch by itself, and its method that does.
ROW_WISE: dict[type[nn.Module], str] = {
    ViT: "encode",
    InternImage: "encode_cells",
    TextEncoder: "forward",
    DenseDecoder: "forward",
}


def encode_in_chunks(objective: MutualInformation, size: int) -> None:
    """Have every encoder and decoder of `objective` work on `size` rows at a time."""
    for module in objective.modules():
        method = ROW_WISE.get(type(module))
        if method is not None:
            setattr(module, method, partial(run_in_chunks, getattr(module, method), size))


def run_in_chunks(
    function: Callable[..., Tensor],  # [B, ...] each -> [B, ...]
    size: int,
    *rows: Tensor,  # [B, ...]
) -> Tensor:
    """`function` of all rows, at most `size` at a time, in parts as equal as they can be.

    Stochastic depth draws the same again in the second pass.
    """
    count = -(-len(rows[0]) // size)
    if count <= 1:
        return function(*rows)
    parts = zip(*(tensor.tensor_split(count) for tensor in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
