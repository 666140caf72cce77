"""Activation checkpointing: what a block saves for its backward pass and what it recomputes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from m3i_fast.config.fields import Recompute

# Calls (function, *arguments) so that less is saved for its backward pass.
Checkpoint = Callable[..., Tensor]

_aten = torch.ops.aten
# Matrix products, attention and convolutions are expensive; all else is one pass over memory, the
# norms among our own operators, too.
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}

VARLEN = "torch_attn::_varlen_attn"  # which torch.nn.attention.varlen registers when imported


def torch_checkpoint(recompute: Recompute) -> Checkpoint | None:
    """Return the function by which torch's layers are checkpointed; None for `none`.

    selective saves the results of products, attention and convolutions; full saves the inputs only.
    Random draws are repeated, so that both give the gradients of `none` bit for bit, except for
    selective under autocast where a model is called more than once in a step: it sums the gradients
    of the calls in the weight's own dtype, none and full in autocast's.
    """
    match recompute:
        case "none":
            return None
        case "full":
            return partial(checkpoint, use_reentrant=False)
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_products)
            return partial(_checkpoint_casts, use_reentrant=False, context_fn=contexts)


def _checkpoint_casts(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
    """Run torch's checkpoint with autocast's cache of cast weights turned off.

    Autocast casts a weight once for all calls of a forward pass and caches the result. A second
    call would then run fewer ops than its recomputation, which selective checkpointing refuses.
    """
    device = inputs[0].device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False):
        output: Tensor = checkpoint(function, *inputs, **options)
    return output


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or op.name() == VARLEN
    kept |= op.namespace == "m3i" and op.name() != "m3i::add_layer_norm"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
