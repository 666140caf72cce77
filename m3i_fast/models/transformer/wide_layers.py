"""The rule by which linear layers run in FP8, one for torchao's and Transformer Engine's.

Legend: K features in, N features out.
"""

from __future__ import annotations

from dataclasses import replace

from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers

FEATURE_MULTIPLE = 16  # of K and N, which cuBLAS's FP8 products need


def is_wide(in_features: int, out_features: int, min_dim: int) -> bool:
    """Return whether K and N are multiples of 16, and neither is below `min_dim`.

    A narrower product takes less time than the quantisation of its operands.
    """
    aligned = in_features % FEATURE_MULTIPLE == 0 == out_features % FEATURE_MULTIPLE
    return aligned and min(in_features, out_features) >= min_dim


def wide_only(
    layers: BlockLayers, min_dim: int, *, narrow: BlockLayers = TORCH_LAYERS
) -> BlockLayers:
    """Return `layers` with those of `narrow` in the place of layers that are not `is_wide`."""

    def choose(dim_in: int, dim_out: int) -> BlockLayers:
        return layers if is_wide(dim_in, dim_out, min_dim) else narrow

    return replace(
        layers,
        layernorm_linear=lambda k, n, bias, eps: choose(k, n).layernorm_linear(k, n, bias, eps),
        linear=lambda k, n: choose(k, n).linear(k, n),
        layernorm_mlp=lambda dim, hidden, mlp, eps: choose(dim, hidden).layernorm_mlp(
            dim, hidden, mlp, eps
        ),
    )
