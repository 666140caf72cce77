"""Linear layers in FP8 by torchao: one scale a tensor, computed at every call ("current" scaling).

Weights, activations, results of products and the state dict keep the dtypes that they have without
FP8; only the operands of the three products of a linear layer are cast, activations and weights to
e4m3, gradients to e5m2. No GPU is needed: torch multiplies FP8 on a CPU as well.

Legend: M rows, K features in, N features out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.backends import mkldnn
from torchao.float8.config import Float8LinearConfig
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_training_tensor import LinearMMConfig

from m3i_fast.models.transformer.blocks import Attention, BlockLayers
from m3i_fast.models.transformer.layers import LayerNormLinear, LayerNormMLP, Linear


@dataclass(slots=True)
class Products:
    """Counts of the FP8 products that ran; a compiled one is counted while it is traced."""

    forward: int = 0
    backward: int = 0
    """Two a layer: the gradients of its input and of its weight."""


PRODUCTS = Products()

_CONFIG = Float8LinearConfig.from_recipe_name("tensorwise")


_MM_CONFIG = LinearMMConfig()  # fast accumulation forward alone


@torch._dynamo.allow_in_graph
class _Product(matmul_with_hp_or_float8_args):
    """torchao's product, which also counts in `PRODUCTS`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        PRODUCTS.forward += 1
        with _without_onednn(x.device):
            return matmul_with_hp_or_float8_args.forward(ctx, x, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        PRODUCTS.backward += 2
        with _without_onednn(grad.device):
            return matmul_with_hp_or_float8_args.backward(ctx, grad)


@contextmanager
def _without_onednn(device: torch.device) -> Iterator[None]:
    """Let torch itself multiply on a CPU.

    Where a CPU has AMX, torch leaves FP8 to oneDNN, which has but its reference code for e4m3 by
    e4m3: the same numbers in several hundred times the time.
    """
    if device.type != "cpu":
        yield
        return
    enabled = mkldnn.set_flags(_enabled=False)[0]
    try:
        yield
    finally:
        mkldnn.set_flags(_enabled=enabled)


def float8_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [..., N], in the dtype of autocast or of x
    """Compute F.linear with all three products in FP8.

    K and N, and for the gradient M, have to be multiples of 16.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    y = _Product.apply(x, weight.t(), _MM_CONFIG, _CONFIG)
    return y if bias is None else y + bias.to(y.dtype)


FLOAT8_LAYERS = BlockLayers(
    layernorm_linear=partial(LayerNormLinear, matmul=float8_linear),
    attention=Attention,
    linear=partial(Linear, matmul=float8_linear),
    layernorm_mlp=partial(LayerNormMLP, matmul=float8_linear),
    row_multiple=16,
)
