"""Which linear layers of a model are worth FP8: one rule for every body.

Letters: K features in, N features out.
"""

from __future__ import annotations

from dataclasses import replace

from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers

FEATURE_MULTIPLE = 16  # cuBLAS's FP8 products ask it of K and of N


def is_wide(in_features: int, out_features: int, min_dim: int) -> bool:
    """Whether K and N are multiples of 16, and neither is below `min_dim`.

    A narrow product takes less time than the quantisation of its operands.
    """
    aligned = in_features % FEATURE_MULTIPLE == 0 == out_features % FEATURE_MULTIPLE
    return aligned and min(in_features, out_features) >= min_dim


def wide_only(
    layers: BlockLayers, min_dim: int, *, narrow: BlockLayers = TORCH_LAYERS
) -> BlockLayers:
    """`layers` where a layer `is_wide`, `narrow` elsewhere; all else is that of `layers`."""

    def choose(dim_in: int, dim_out: int) -> BlockLayers:
        return layers if is_wide(dim_in, dim_out, min_dim) else narrow

    return replace(
        layers,
        layernorm_linear=lambda k, n, bias: choose(k, n).layernorm_linear(k, n, bias),
        linear=lambda k, n: choose(k, n).linear(k, n),
        layernorm_mlp=lambda dim, hidden: choose(dim, hidden).layernorm_mlp(dim, hidden),
    )
