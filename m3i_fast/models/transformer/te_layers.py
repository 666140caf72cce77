"""The blocks' modules by Transformer Engine, with the state dict of torch's.

Transformer Engine's GELU is the tanh approximation, torch's here the exact one: an activation
differs by at most 4.8e-4 and its derivative by 8.7e-4, the rounding error of bf16 at values of 1/8
and 1/4. Weights trained with either run with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, get_args

from m3i_fast.config.fields import Recompute
from m3i_fast.models.activation_checkpointing import Checkpoint
from m3i_fast.models.transformer.blocks import BlockLayers

Fp8Recipe = Literal["fp8_current", "fp8_delayed", "fp8_block", "mxfp8"]


def te_layers() -> BlockLayers:
    """Return a block's constructors by Transformer Engine.

    Parameters are fp32 and are cast by autocast or FSDP2; `te_autocast` turns FP8 on. A key mask
    has to be True for the first tokens of a row. Activation checkpointing is none or full: the
    products are no operations of torch, so that selective could save none of them. Raises
    ValueError where Transformer Engine cannot be imported, with what to install.
    """
    modules = _modules()
    return BlockLayers(
        layernorm_linear=modules.LayerNormLinear,
        attention=modules.Attention,
        linear=modules.Linear,
        layernorm_mlp=modules.LayerNormMLP,
        checkpoint=te_checkpoint,
    )


def te_checkpoint(recompute: Recompute) -> Checkpoint | None:
    """Return Transformer Engine's checkpoint function, which also restores the scales of FP8.

    None for `none`. Raises ValueError for `selective`.
    """
    if recompute == "selective":
        raise ValueError(
            "activation_checkpointing: expected none or full with Transformer Engine's layers, "
            "whose products cannot be saved one by one, got selective"
        )
    if recompute == "none":
        return None
    return partial(_te().checkpoint, use_reentrant=False)


def te_recipe(name: Fp8Recipe) -> Any:
    """Return Transformer Engine's recipe of a name; ValueError for an unknown one.

    fp8_delayed keeps a history of maxima on each rank without a reduction, so that encoders may run
    more than once a step; the history is not saved and starts empty after a resume.
    """
    _modules()
    from transformer_engine.common import recipe

    match name:
        case "fp8_current":
            return recipe.Float8CurrentScaling(fp8_format=recipe.Format.HYBRID)
        case "fp8_delayed":
            return recipe.DelayedScaling(
                fp8_format=recipe.Format.HYBRID,
                amax_history_len=1024,
                amax_compute_algo="max",
                reduce_amax=False,
            )
        case "fp8_block":
            return recipe.Float8BlockScaling()
        case "mxfp8":
            return recipe.MXFP8BlockScaling()
    raise ValueError(f"recipe: expected one of {', '.join(get_args(Fp8Recipe))}, got {name!r}")


def te_autocast(recipe: Any | None) -> AbstractContextManager[None]:
    """Return a context in which products run in FP8 by a recipe of `te_recipe`; None: without FP8.

    A recipe is passed on even where FP8 is off: Transformer Engine's default depends on the GPU.
    """
    enabled = recipe is not None
    used = recipe if enabled else te_recipe("fp8_current")
    return _te().autocast(enabled=enabled, recipe=used)


def te_unavailable(recipe: Fp8Recipe) -> str | None:
    """Return Transformer Engine's reason why this GPU cannot run a recipe; None: it can."""
    te = _te()
    probes: dict[str, Callable[..., tuple[bool, str]]] = {
        "mxfp8": te.is_mxfp8_available,
        "fp8_block": te.is_fp8_block_scaling_available,
    }
    usable, reason = probes.get(recipe, te.is_fp8_available)(return_reason=True)
    return None if usable else reason


@cache
def _modules() -> ModuleType:
    try:
        from m3i_fast.models.transformer import te_modules
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"Transformer Engine: expected it to be importable, got {type(error).__name__}: "
            f"{error}. Beside a torch with CUDA 13 install it by: pip install "
            '--no-build-isolation "m3i-fast[te]"; `m3i-fast doctor` says more'
        ) from error
    return te_modules


def _te() -> Any:
    return _modules().te
