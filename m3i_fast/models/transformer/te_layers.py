"""Transformer Engine's body of the blocks: one state dict with torch's.

Its GELU is the tanh approximation and torch's the exact one: an activation differs by at most
4.8e-4 and its derivative by 8.7e-4, what bf16 rounds values of an eighth and of a quarter by.
Weights trained with either run with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, get_args

from m3i_fast.config.fields import Recompute
from m3i_fast.models.recompute import Checkpoint
from m3i_fast.models.transformer.blocks import BlockLayers

Fp8Recipe = Literal["fp8_current", "fp8_delayed", "fp8_block", "mxfp8"]


def te_layers() -> BlockLayers:
    """A block's parts by Transformer Engine; raises ValueError where it cannot be imported.

    The parameters are fp32 and are cast by autocast or FSDP2, FP8 by `te_autocast`. A key mask has
    to be True for the first tokens of a row. The blocks' recomputation is none or full: the
    products are not torch's operations, so none of them could be kept.
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
    """Transformer Engine's checkpointing, which also repeats the scales of FP8."""
    if recompute == "selective":
        raise ValueError(
            "activation_checkpointing: expected none or full with Transformer Engine's layers, of "
            "whose products none can be kept, got selective"
        )
    if recompute == "none":
        return None
    return partial(_te().checkpoint, use_reentrant=False)


def te_recipe(name: Fp8Recipe) -> Any:
    """Transformer Engine's recipe of that name.

    fp8_delayed keeps a history of maxima for each rank, so that encoders may run more than once a
    step; it is not saved, so that it begins anew after a resume.
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
    """Products in FP8 by `te_recipe`'s recipe; None: by torch's autocast alone.

    A recipe is given even where it is not used: Transformer Engine's own choice depends on the GPU.
    """
    enabled = recipe is not None
    used = recipe if enabled else te_recipe("fp8_current")
    return _te().autocast(enabled=enabled, recipe=used)


def te_unavailable(recipe: Fp8Recipe) -> str | None:
    """Why this machine's GPU cannot run `recipe`, in Transformer Engine's words; None: it can."""
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
            f"{error}. The extra te installs it, beside a torch with CUDA 13: pip install "
            '--no-build-isolation "m3i-fast[te]"; `m3i-fast doctor` says more'
        ) from error
    return te_modules


def _te() -> Any:
    return _modules().te
