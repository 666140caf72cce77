"""Bidirectional text Transformer: the caption's target encoder.

Letters: B batch, T tokens, D width, E width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from m3i_fast.config_fields import DEPTHS, MAX_RATIO, SOME_ROWS, WIDTHS, check_fields
from m3i_fast.models.recompute import Recompute, check_recompute
from m3i_fast.models.transformer.blocks import (
    INIT_STD,
    LAYER_NORM_EPS,
    TORCH_LAYERS,
    Block,
    BlockLayers,
    Linear,
    reset_children,
)

POSITION_STD = 0.01  # CLIP


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Size of the text Transformer; the defaults are CLIP's base size."""

    vocab_size: Annotated[int, SOME_ROWS] = 49408
    """Number of token ids (CLIP's byte-pair encoding)."""
    context_length: Annotated[int, WIDTHS] = 77
    """Most tokens of a caption."""
    dim: Annotated[int, WIDTHS] = 512
    """Width of a token."""
    depth: Annotated[int, DEPTHS] = 12
    """Number of blocks."""
    num_heads: Annotated[int, WIDTHS] = 8
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over dim."""
    embed_dim: Annotated[int, WIDTHS] = 512
    """Width of a caption's embedding."""
    activation_checkpointing: Recompute = "none"
    """What each block computes again in the backward pass. selective: norms and GELU, which costs
    little; full: all of it, the least memory for about a third more compute."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim: expected a multiple of num_heads = {self.num_heads}, got {self.dim}"
            )
        if not 0 < self.mlp_ratio <= MAX_RATIO:
            raise ValueError(f"mlp_ratio: expected 0 < ratio <= {MAX_RATIO}, got {self.mlp_ratio}")
        check_recompute(self.activation_checkpointing)


class TextEncoder(nn.Module):
    """Caption to embedding: mean over the real tokens (M3I Fig. 1), then a linear projection."""

    def __init__(self, cfg: TextConfig, *, layers: BlockLayers = TORCH_LAYERS) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(
            Block(
                cfg.dim,
                cfg.num_heads,
                mlp_ratio=cfg.mlp_ratio,
                activation_checkpointing=cfg.activation_checkpointing,
                layers=layers,
            )
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, LAYER_NORM_EPS)
        # no bias: an absent caption is the zero vector
        self.projection = Linear(cfg.dim, cfg.embed_dim, bias=False)
        self.pos_embed = nn.Parameter(torch.empty(1, cfg.context_length, cfg.dim))
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter, as after `to_empty`."""
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.projection.weight, std=self.cfg.dim**-0.5)
        nn.init.normal_(self.pos_embed, std=POSITION_STD)

    def forward(self, token_ids: Tensor, num_tokens: Tensor) -> Tensor:
        """[B, T] int32 or int64 ids, [B] int64 real tokens -> [B, E], not normalised.

        What stands after the real tokens changes nothing. A row with num_tokens = 0 gives zeros
        and passes no gradient on.
        """
        if token_ids.ndim != 2 or token_ids.shape[1] > self.cfg.context_length:
            raise ValueError(
                f"token_ids: expected [B, T] with T <= context_length = "
                f"{self.cfg.context_length}, got {list(token_ids.shape)}"
            )
        length = token_ids.shape[1]
        place = torch.arange(length, device=token_ids.device)
        # an empty caption attends to its first padding: a softmax over nothing is NaN
        key_mask = place < num_tokens.clamp(min=1)[:, None]  # [B, T]
        x = self.token_embedding(token_ids) + self.pos_embed[:, :length]
        for block in self.blocks:
            x = block(x, key_mask)
        x = self.norm(x)
        real = (place < num_tokens[:, None]).to(x.dtype)
        mean = (x * real[..., None]).sum(1) / num_tokens.clamp(min=1)[:, None]
        return self.projection(mean)
