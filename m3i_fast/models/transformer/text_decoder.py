"""The text Transformer that writes a picture's caption from its cells.

Legend: B images, R texts of an image, T tokens of a text, n cells of an image, C their width, D
width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.models.transformer.blocks import MASK_ALIGNMENT, TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.decoder_block import DecoderBlock
from m3i_fast.models.transformer.layers import INIT_STD, Residual, product_dtype, reset_children
from m3i_fast.models.transformer.text_encoder import POSITION_STD


class TextDecoder(nn.Module):
    """Caption decoder: tokens attend to those before them and to the image's cells.

    CoCa (arXiv 2205.01917, section 3.2) without its unimodal half, Cap of CapPa (arXiv 2306.07915).
    With `parallel` above 0 some captions are read as mask tokens alone, all of which see each other
    (CapPa, section 3.2). Its last tokens are to be compared with a vocabulary by the caller.
    """

    def __init__(
        self,
        cfg: CaptionerConfig,
        *,
        vocab_size: int,
        context_length: int,
        input_dim: int,
        layers: BlockLayers = TORCH_LAYERS,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(
            DecoderBlock(
                cfg.dim,
                cfg.num_heads,
                read_dim=input_dim,
                mlp_ratio=cfg.mlp_ratio,
                causal=not cfg.parallel,
                activation_checkpointing=cfg.activation_checkpointing,
                layers=layers,
            )
            for _ in range(cfg.depth)
        )
        self.norm = nn.LayerNorm(cfg.dim, 1e-6)
        self.pos_embed = nn.Parameter(torch.empty(1, context_length - 1, cfg.dim))
        self.mask_token = nn.Parameter(torch.empty(cfg.dim)) if cfg.parallel else None
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter, as after `to_empty`."""
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=INIT_STD)
        nn.init.normal_(self.pos_embed, std=POSITION_STD)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=INIT_STD)

    def forward(self, cells: Tensor, token_ids: Tensor, parallel: Tensor | None = None) -> Tensor:
        """Read the tokens before each one but the first: [B, n, C], [B, T] -> [B, T - 1, D].

        Row t of the result is of token t + 1. token_ids: int32 or int64; padding at the end has no
        effect on the rows before it. Of several texts of an image, [B, R, T] -> [B, R, T - 1, D],
        each is read by itself. parallel: [B] bool, the captions of which no token is read, where
        the config has any; they depend on T, and on no id. Raises ValueError where T exceeds the
        context length, or for parallel rows of a decoder without them.
        """
        length = token_ids.shape[-1] - 1
        if token_ids.ndim not in (2, 3) or not 1 <= length <= self.pos_embed.shape[1]:
            raise ValueError(
                f"token_ids: expected [B, T] or [B, R, T] with 2 <= T <= context_length = "
                f"{self.pos_embed.shape[1] + 1}, got {list(token_ids.shape)}"
            )
        if (parallel is None) != (self.mask_token is None):
            expected = "none" if self.mask_token is None else "[B] bool"
            raise ValueError(
                f"parallel: expected {expected} with captioner.parallel = {self.cfg.parallel:g}, "
                f"got {None if parallel is None else list(parallel.shape)}"
            )
        several = token_ids.shape[:-1]
        token_ids = token_ids.flatten(0, -2)
        x, mask = self.token_embedding(token_ids[:, :-1]), None
        if parallel is not None and self.mask_token is not None:
            x = torch.where(parallel[:, None, None], self.mask_token.to(x.dtype), x)
            mask = causal_mask(parallel, length, product_dtype(x))
        stream = Residual(x + self.pos_embed[:, :length])
        for block in self.blocks:
            stream = block(stream, cells, mask)
        hidden: Tensor = self.norm(stream.total())
        return hidden if len(several) == 1 else hidden.unflatten(0, several)


def causal_mask(whole: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention's logits: [B] bool -> [B, 1, length, length] `dtype`.

    0 where a token attends, else minus infinity. whole: the rows whose tokens attend to all of
    them; in the others a token attends to itself and those before it. Rows are aligned in memory
    for torch's memory-efficient attention.
    """
    aligned = -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT
    place = torch.arange(length, device=whole.device)
    hidden = (place[:, None] < place) & ~whole[:, None, None, None]  # [B, 1, length, length]
    bias = hidden.new_zeros((*hidden.shape[:3], aligned), dtype=dtype)[..., :length]
    return bias.masked_fill_(hidden, -torch.inf)
