"""timm's weights as Transformer Engine's TransformerLayer orders them, and back, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.timm import load_timm, to_timm
from m3i_fast.export.transformer_engine import (
    deinterleave_qkv,
    from_transformer_layers,
    interleave_qkv,
    to_transformer_layers,
)
from m3i_fast.models.transformer.vit import ViT

TINY = ViTConfig(
    image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, class_token=True, num_registers=4
)


def perturbed(cfg: ViTConfig) -> ViT:
    vit = ViT(cfg)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter))
    return vit


def interleaved_attention(
    x: Tensor, weight: Tensor, bias: Tensor, proj: torch.nn.Module, num_heads: int
) -> Tensor:
    """As Transformer Engine's MultiheadAttention reads it: [B, T, H, 3 x D / H], split last."""
    qkv = F.linear(x, weight, bias).unflatten(-1, (num_heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    return proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_interleaved_rows_are_timms_attention_head_by_head() -> None:
    timm_attention = TimmAttention(48, num_heads=3, qkv_bias=True).double()
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    qkv = timm_attention.qkv
    weight, bias = interleave_qkv(qkv.weight, 3), interleave_qkv(qkv.bias, 3)
    got = interleaved_attention(x, weight, bias, timm_attention.proj, 3)
    torch.testing.assert_close(got, timm_attention(x), atol=1e-12, rtol=1e-12)
    assert torch.equal(deinterleave_qkv(weight, 3), qkv.weight)
    assert not torch.equal(weight, qkv.weight)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "num_registers": 0}])
def test_from_timm_to_transformer_engine_and_back_is_the_same(
    options: dict[str, Any], interleaved: bool
) -> None:
    cfg = replace(TINY, **options)
    model = to_timm(perturbed(cfg))
    state = to_transformer_layers(load_timm(model, cfg), interleaved=interleaved)
    assert "blocks.1.self_attention.layernorm_qkv.layer_norm_weight" in state
    state |= {"blocks.0.self_attention.proj._extra_state": torch.empty(0, dtype=torch.uint8)}
    back = to_timm(from_transformer_layers(state, cfg, interleaved=interleaved))
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_only_the_projections_to_queries_keys_and_values_move() -> None:
    vit = perturbed(TINY)
    state = to_transformer_layers(vit)
    plain = to_transformer_layers(vit, interleaved=False)
    moved = {name for name, value in state.items() if not torch.equal(value, plain[name])}
    assert moved == {
        f"blocks.{i}.self_attention.layernorm_qkv.{name}"
        for i in (0, 1)
        for name in ("weight", "bias")
    }
    state["pos_embed"].zero_()
    assert vit.pos_embed.any()


def test_what_does_not_fit_is_named() -> None:
    state = to_transformer_layers(ViT(TINY))
    state["blocks.0.self_attention.proj.scale"] = state.pop("blocks.0.self_attention.proj.bias")
    state["norm.weight"] = torch.ones(31)
    with pytest.raises(ValueError) as caught:
        from_transformer_layers(state, TINY)
    for expected in (
        "missing: blocks.0.proj.bias",
        "unexpected: blocks.0.proj.scale",
        "norm.weight: expected [32], got [31]",
    ):
        assert expected in str(caught.value)
    scaled = replace(TINY, layer_scale_init=0.1)
    with pytest.raises(ValueError, match=r"layer_scale_init: expected none .* got 0\.1"):
        to_transformer_layers(ViT(scaled))
    with pytest.raises(ValueError, match="layer_scale_init: expected none"):
        from_transformer_layers(state, scaled)
