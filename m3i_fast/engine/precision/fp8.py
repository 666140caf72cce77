"""How a run's arithmetic is applied: layers, the forward context, and a check that FP8 ran."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from m3i_fast.engine.precision.arithmetic import Arithmetic
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.wide_layers import wide_only

logger = logging.getLogger(__name__)


def layers_of(arithmetic: Arithmetic, min_dim: int) -> BlockLayers:
    """Return the layers of the chosen library; in FP8 only those at least `min_dim` wide."""
    if arithmetic.backend == "torch":
        return TORCH_LAYERS
    layers = _te().te_layers() if arithmetic.backend == "te" else _torchao().FLOAT8_LAYERS
    return wide_only(layers, min_dim) if arithmetic.is_fp8 else layers


@contextmanager
def forward_context(arithmetic: Arithmetic, device: torch.device) -> Iterator[None]:
    """Enclose the forward pass in torch's autocast, and Transformer Engine's if it runs FP8."""
    low = arithmetic.compute_dtype == torch.bfloat16
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=low))
        if arithmetic.backend == "te" and arithmetic.is_fp8:
            stack.enter_context(_te_region(arithmetic))
        yield


def keep_calls_apart(model: nn.Module, arithmetic: Arithmetic) -> None:
    """Have products in FP8 see one batch at a time, of the rows that `gemm_shapes` checked."""
    if arithmetic.is_fp8:
        for module in model.modules():
            if hasattr(module, "calls_apart"):
                module.calls_apart = True  # type: ignore[assignment]


def expect_fp8(model: nn.Module, arithmetic: Arithmetic) -> None:
    """Raise RuntimeError after the first forward pass of `model` if no product ran in FP8.

    The count is the layers' own: torchao's products, or the layers that Transformer Engine
    quantised.
    """
    if not arithmetic.is_fp8:
        return
    before = _num_run(model, arithmetic)

    def check(*_: Any) -> None:
        handle.remove()
        num_products = _num_run(model, arithmetic) - before
        if not num_products:
            parts = ", ".join(part for part, _ in arithmetic.products)
            raise RuntimeError(
                f"precision: expected {arithmetic.recipe} by {arithmetic.backend} in {parts}, but "
                "no product of the first forward pass ran in FP8; --precision bf16 trains without"
            )
        logger.info(
            "precision: %d in %s in the first forward pass", num_products, arithmetic.recipe
        )

    handle = model.register_forward_hook(check)


def _num_run(model: nn.Module, arithmetic: Arithmetic) -> int:
    if arithmetic.backend == "torchao":
        return int(_torchao().PRODUCTS.forward)
    return sum(bool(getattr(module, "fp8_initialized", False)) for module in model.modules())


def _te_region(arithmetic: Arithmetic) -> AbstractContextManager[None]:
    library = _te()
    recipe = library.te_recipe(arithmetic.recipe)
    if arithmetic.recipe == "fp8_delayed":
        recipe.reduce_amax = arithmetic.reduce_amax
    region: AbstractContextManager[None] = library.te_autocast(recipe)
    return region


def _torchao() -> ModuleType:
    return importlib.import_module("m3i_fast.models.transformer.float8")


def _te() -> ModuleType:
    return importlib.import_module("m3i_fast.models.transformer.te_layers")
