"""Activation checkpointing: what a block keeps for its backward pass and what it repeats there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]

# Runs a function of tensors so that its backward pass finds less saved; (function, *its arguments).
Checkpoint = Callable[..., Tensor]

_aten = torch.ops.aten
# Matrix products, attention and convolutions: dear to compute. All else is a pass over memory.
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


def check_recompute(value: object) -> None:
    """ValueError unless `value` is one of the ways to checkpoint."""
    if value not in get_args(Recompute):
        raise ValueError(
            f"activation_checkpointing: expected none, selective or full, got {value!r}"
        )


def torch_checkpoint(recompute: Recompute) -> Checkpoint | None:
    """How torch's layers checkpoint; None: not at all.

    selective keeps what products, attention and convolutions return; full keeps the inputs alone.
    Both give the gradients of none bit for bit: random draws are repeated.
    """
    match recompute:
        case "none":
            return None
        case "full":
            return partial(checkpoint, use_reentrant=False)
        case "selective":
            contexts = partial(create_selective_checkpoint_contexts, _keep_products)
            return partial(checkpoint, use_reentrant=False, context_fn=contexts)


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT or op.namespace == "m3i"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
