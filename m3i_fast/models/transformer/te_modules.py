"""Transformer Engine's modules under the signatures of `BlockLayers`.

Only te_layers imports this, on first use, since the import needs CUDA. Legend: B batch, T tokens,
D width, H heads.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn

from m3i_fast.config.fields import Mlp
from m3i_fast.models.transformer.blocks import rotate_qk
from m3i_fast.models.transformer.layers import LAYER_NORM_EPS, init_weight

_ACTIVATIONS: dict[Mlp, str] = {"gelu_tanh": "gelu", "quick_gelu": "qgelu"}  # ours, theirs


def _placed() -> dict[str, object]:
    """Return the arguments that put fp32 parameters on torch's default device.

    The same seed then gives the weights of torch's modules. The device is a string, because
    Transformer Engine compares it with "meta".
    """
    return {"params_dtype": torch.float32, "device": str(torch.get_default_device())}


class WithoutExtraState:
    """A mixin that keeps `_extra_state`, a pickle for delayed scaling, out of state dicts.

    Loading a state dict that has one fails with an unexpected key.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class Linear(WithoutExtraState, te.Linear):
    """Transformer Engine's linear layer: weight [out, in], bias [out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, init_method=init_weight, **_placed())


class LayerNormLinear(WithoutExtraState, te.LayerNormLinear):
    """A fused LayerNorm and linear layer: [..., in_features] -> [..., out_features].

    In FP8 the norm writes its output quantised.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, eps: float = LAYER_NORM_EPS
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            eps=eps,
            init_method=init_weight,
            bias=bias,
            **_placed(),
        )


class LayerNormMLP(WithoutExtraState, te.LayerNormMLP):
    """A fused LayerNorm and MLP: [..., dim] -> [..., dim].

    The GELU is the tanh approximation, the only one that Transformer Engine has beside CLIP's; its
    SwiGLU is ours, with the gate before the value.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Mlp = "gelu",
        eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__(
            dim,
            hidden_dim,
            eps=eps,
            init_method=init_weight,
            output_layer_init_method=init_weight,
            activation=_ACTIVATIONS.get(activation, activation),
            **_placed(),
        )


class DotProductAttention(WithoutExtraState, te.DotProductAttention):
    """Attention without dropout: q, k and v [B, T, H, D / H] -> [B, T, D]."""

    def __init__(self, num_heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__(
            num_heads,
            head_dim,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="causal" if causal else "no_mask",
        )


class Attention(nn.Module):
    """`blocks.Attention` by cuDNN or FlashAttention, whichever Transformer Engine chooses."""

    def __init__(self, num_heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.core = DotProductAttention(num_heads, head_dim, causal)

    def prepare_mask(self, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the mask itself, [B, T] bool."""
        return key_mask

    def forward(
        self, qkv: Tensor, key_mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """Attend from every token to every token: [B, T, 3 D] -> [B, T, D].

        qkv: q, k and v side by side, each head after head. key_mask: [B, T] bool, True for the real
        tokens, the first ones of each row; the padding after them gets zeros. rotation: as of
        `blocks.Attention`; Transformer Engine's own rotary positions have one table for all rows,
        whose patches differ here.
        """
        B, T, _ = qkv.shape
        heads = qkv.view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        q, k, v = rotate_qk(heads, rotation)
        if key_mask is None:
            return self.core(q, k, v)
        masked = ~key_mask[:, None, None, :]  # True is masked out, since 1.7
        out = self.core(q, k, v, attention_mask=masked, attn_mask_type="padding")
        # Not every backend writes the padding, and 0 x NaN would be NaN.
        return torch.where(key_mask[..., None], out, 0)
