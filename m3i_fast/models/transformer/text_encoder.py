"""The text Transformer that encodes captions as targets.

Legend: B batch, T tokens, D width, E width of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Block, BlockLayers
from m3i_fast.models.transformer.layers import (
    INIT_STD,
    Linear,
    Residual,
    product_dtype,
    reset_children,
)

POSITION_STD = 0.01  # CLIP


class TextEncoder(nn.Module):
    """Text encoder: mean over the real tokens (M3I, figure 1), then a linear projection.

    With causal attention the last real token takes the place of the mean, as in CLIP.
    """

    def __init__(self, cfg: TextConfig, *, layers: BlockLayers = TORCH_LAYERS) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(
            Block(
                cfg.dim,
                cfg.num_heads,
                mlp_ratio=cfg.mlp_ratio,
                mlp=cfg.mlp,
                norm_eps=cfg.norm_eps,
                causal=cfg.attention == "causal",
                activation_checkpointing=cfg.activation_checkpointing,
                layers=layers,
            )
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps)
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
        """Embed captions, without normalising: [B, T], [B] -> [B, E].

        token_ids: int32 or int64. num_tokens: int64, the real tokens of each row; the padding after
        them has no effect. A row with num_tokens = 0 gives zeros and takes no gradient. Raises
        ValueError where T exceeds context_length.
        """
        if token_ids.ndim != 2 or token_ids.shape[1] > self.cfg.context_length:
            raise ValueError(
                f"token_ids: expected [B, T] with T <= context_length = "
                f"{self.cfg.context_length}, got {list(token_ids.shape)}"
            )
        length = token_ids.shape[1]
        place = torch.arange(length, device=token_ids.device)
        is_causal = self.cfg.attention == "causal"
        # an empty caption attends to its first padding: a softmax over nothing is NaN
        key_mask = None if is_causal else place < num_tokens.clamp(min=1)[:, None]  # [B, T]
        x = self.token_embedding(token_ids) + self.pos_embed[:, :length]
        if key_mask is not None:
            first = self.blocks[0]
            assert isinstance(first, Block)
            key_mask = first.prepare_mask(key_mask, product_dtype(x))
        stream = Residual(x)
        for block in self.blocks:
            stream = block(stream, key_mask)
        x = self.norm(stream.total())
        if is_causal:
            weight = (place == num_tokens[:, None] - 1).to(x.dtype)
            return self.projection((x * weight[..., None]).sum(1))
        real = (place < num_tokens[:, None]).to(x.dtype)
        mean = (x * real[..., None]).sum(1) / num_tokens.clamp(min=1)[:, None]
        return self.projection(mean)
