"""The Transformer block that also reads other tokens, with Transformer Engine's parameter names.

Legend: B batch, T tokens, D width, H heads, M tokens that are read, C their width, R sequences that
read the same ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.fields import Recompute
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Attention, BlockLayers, add_and_run
from m3i_fast.models.transformer.layers import LAYER_NORM_EPS, Residual, reset_children


class CrossAttention(nn.Module):
    """Scaled dot-product attention without parameters, of tokens to those of another sequence."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, query: Tensor, key_value: Tensor) -> Tensor:
        """Attend from every token to every one read: [R B, T, D], [B, M, 2 D] -> [R B, T, D].

        key_value: keys and values side by side, each head after head; R neighbours read the same.
        """
        heads, shape = (self.num_heads, -1), query.shape
        if shape[0] != key_value.shape[0]:  # their tokens are queries of one call
            query = query.reshape(key_value.shape[0], -1, shape[2])
        q = query.unflatten(2, heads).transpose(1, 2)  # [B, H, T, D / H]
        k, v = (x.unflatten(2, heads).transpose(1, 2) for x in key_value.chunk(2, dim=2))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attended if attended.shape == shape else attended.reshape(shape)


class DecoderBlock(nn.Module):
    """A pre-norm Transformer decoder block: [R B, T, D], read [B, M, C] -> [R B, T, D].

    x <- x + proj(attention(layernorm_qkv(x)))
    x <- x + inter_proj(inter_attention(layernorm_query(x), key_value(read)))
    x <- x + layernorm_mlp(x)

    The layer of `torch.nn.TransformerDecoder` with norm_first: what is read is not normed. causal:
    each token attends to itself and those before it; else to those that the call's mask lets it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        read_dim: int,
        mlp_ratio: float = 4.0,
        causal: bool = True,
        activation_checkpointing: Recompute = "none",
        layers: BlockLayers = TORCH_LAYERS,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        eps, head_dim = LAYER_NORM_EPS, dim // num_heads
        self.checkpoint = layers.checkpoint(activation_checkpointing)
        self.layernorm_qkv = layers.layernorm_linear(dim, 3 * dim, True, eps)
        # a mask of any shape is not every library's
        self.attention = (
            layers.attention(num_heads, head_dim, True)
            if causal
            else Attention(num_heads, head_dim)
        )
        self.proj = layers.linear(dim, dim)
        self.layernorm_query = layers.layernorm_linear(dim, dim, True, eps)
        self.key_value = layers.linear(read_dim, 2 * dim)
        self.inter_attention = CrossAttention(num_heads)
        self.inter_proj = layers.linear(dim, dim)
        self.layernorm_mlp = layers.layernorm_mlp(dim, int(dim * mlp_ratio), "gelu", eps)

    def reset_parameters(self) -> None:
        """Initialise every parameter, as after `to_empty`."""
        reset_children(self)

    def forward(self, stream: Residual, read: Tensor, mask: Tensor | None = None) -> Residual:
        """Run the block; mask: [B, 1, T, T], added to the logits of a block that is not causal."""
        if self.checkpoint is None or not stream.x.requires_grad:
            return self._run(stream, read, mask)
        return Residual(self.checkpoint(self._run_whole, stream.total(), read, mask))

    def _run_whole(self, x: Tensor, read: Tensor, mask: Tensor | None) -> Tensor:
        return self._run(Residual(x), read, mask).total()

    def _run(self, stream: Residual, read: Tensor, mask: Tensor | None) -> Residual:
        x, qkv = add_and_run(self.layernorm_qkv, stream)
        stream = Residual(x, self.proj(self.attention(qkv, mask)))
        x, query = add_and_run(self.layernorm_query, stream)
        stream = Residual(x, self.inter_proj(self.inter_attention(query, self.key_value(read))))
        return Residual(*add_and_run(self.layernorm_mlp, stream))
