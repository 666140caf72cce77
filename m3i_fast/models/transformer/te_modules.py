"""Transformer Engine's modules as a block's parts; imported by te_layers alone, for it needs CUDA.

Letters: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn

from m3i_fast.models.transformer.blocks import LAYER_NORM_EPS, init_weight, turned


def _placed() -> dict[str, object]:
    """fp32 parameters where torch's own modules would put them, so that one seed gives one model.

    A string, because Transformer Engine compares it with "meta".
    """
    return {"params_dtype": torch.float32, "device": str(torch.get_default_device())}


class WithoutExtraState:
    """Keeps `_extra_state` out of state dicts: that of delayed scaling is a pickle.

    Nothing is saved, and a state dict that has one is refused as having an unexpected key.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class Linear(WithoutExtraState, te.Linear):
    """weight [out, in], bias [out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, init_method=init_weight, **_placed())


class LayerNormLinear(WithoutExtraState, te.LayerNormLinear):
    """[..., in_features] -> [..., out_features]; in FP8 the norm's output is quantised at once."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(
            in_features,
            out_features,
            eps=LAYER_NORM_EPS,
            init_method=init_weight,
            bias=bias,
            **_placed(),
        )


class LayerNormMLP(WithoutExtraState, te.LayerNormMLP):
    """[..., dim] -> [..., dim]; its GELU is the tanh approximation, for it has no other."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(
            dim,
            hidden_dim,
            eps=LAYER_NORM_EPS,
            init_method=init_weight,
            output_layer_init_method=init_weight,
            activation="gelu",
            **_placed(),
        )


class DotProductAttention(WithoutExtraState, te.DotProductAttention):
    """q, k, v [B, T, H, D / H] each -> [B, T, D]; without dropout."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(
            num_heads,
            head_dim,
            attention_dropout=0.0,
            qkv_format="bshd",
            attn_mask_type="no_mask",
        )


class Attention(nn.Module):
    """As `blocks.Attention`, by cuDNN or FlashAttention, whichever Transformer Engine chooses."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.core = DotProductAttention(num_heads, head_dim)

    def forward(
        self, qkv: Tensor, key_mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """[B, T, 3 D] (q; k; v, each head after head) -> [B, T, D].

        key_mask: [B, T] bool, True for the first tokens of each row, the real ones; what stands
        after them gets zeros. rotation: as `blocks.Attention`; Transformer Engine's own has one
        table for all rows, which have other patches each here.
        """
        B, T, _ = qkv.shape
        parts = qkv.view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        q, k, v = turned(parts, rotation)
        if key_mask is None:
            return self.core(q, k, v)
        masked = ~key_mask[:, None, None, :]  # True is masked out, since 1.7
        out = self.core(q, k, v, attention_mask=masked, attn_mask_type="padding")
        # not every backend writes there, and 0 x NaN would be NaN
        return torch.where(key_mask[..., None], out, 0)
