"""The Vision Transformer, which encodes any subset of an image's patch tokens.

Legend: B batch, N patches of the image, n of them encoded, R prefix tokens (class and registers),
D width, H heads, I images in inputs; of pictures of any size P pictures, T patches of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.encoder import ImageEncoder, PackedCells, PackedTokens, take_cells
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Attention, Block, BlockLayers
from m3i_fast.models.transformer.drop_path import layer_priorities
from m3i_fast.models.transformer.layers import Residual, reset_children
from m3i_fast.models.transformer.packing import (
    Packed,
    Sequences,
    pack,
    sort_by_length,
    unpack,
)
from m3i_fast.models.transformer.positions import (
    grid_centres,
    grid_embedding,
    patch_centres,
    resample_grid,
    resample_to_grids,
    rotary,
    whole_pictures,
)
from m3i_fast.ops.views import cut_patches

PREFIX_STD = 1e-6  # timm's class and register tokens


class Masking(NamedTuple):
    """Patches that are embedded as a mask token, with their positions."""

    hidden: Tensor  # [B, N] bool
    token: Tensor  # [D]


def embed_patches(
    images: Tensor,  # [B, 3, H, W]
    weight: Tensor,  # [D, 3, P, P]
    bias: Tensor | None,  # [D]
) -> Tensor:  # [B, N, D]
    """Compute the convolution of stride P as one matrix product over the pixels of the patches.

    Its result is contiguous by token. That of a convolution is contiguous by channel, so that each
    norm and sum of the blocks that follow copies or strides.
    """
    return F.linear(cut_patches(images, weight.shape[-1]), weight.flatten(1), bias)


class ViT(ImageEncoder):
    """A Vision Transformer in three steps: `embed` patches, select some, `encode` the selected.

    On the meta device `to_empty` and then `reset_parameters` give the weights of a direct build.
    """

    calls_apart = False
    """Whether batches of several lengths are encoded one by one: in chunks, or in CUDA graphs."""

    def __init__(self, cfg: ViTConfig, *, layers: BlockLayers = TORCH_LAYERS) -> None:
        super().__init__()
        self.cfg = cfg
        self.dim, self.summary_dim = cfg.dim, cfg.summary_dim
        self._row_multiple = layers.row_multiple
        self.patch_embed = nn.Conv2d(3, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        self.blocks = nn.ModuleList(
            Block(
                cfg.dim,
                cfg.num_heads,
                mlp_ratio=cfg.mlp_ratio,
                qkv_bias=cfg.qkv_bias,
                key_bias=cfg.key_bias,
                mlp=cfg.mlp,
                norm_eps=cfg.norm_eps,
                layer_scale_init=cfg.layer_scale_init,
                drop_path=cfg.drop_path(i),
                drop_path_mode=cfg.drop_path_mode,
                activation_checkpointing=cfg.activation_checkpointing,
                layers=layers,
            )
            for i in range(cfg.depth)
        )
        self.norm_pre = nn.LayerNorm(cfg.dim, cfg.norm_eps) if cfg.pre_norm else nn.Identity()
        self.norm = nn.LayerNorm(cfg.dim, cfg.norm_eps) if cfg.final_norm else nn.Identity()
        num_places = cfg.num_patches if cfg.position == "absolute" else 0
        self.pos_embed = self._table(num_places)
        self.class_token = self._table(int(cfg.class_token))
        self.register_tokens = self._table(cfg.num_registers)
        self._reset_own()

    @property
    def num_prefix(self) -> int:
        """Number of tokens before the patches in the result of `encode`."""
        return self.cfg.num_prefix

    def _table(self, count: int) -> nn.Parameter | None:
        return nn.Parameter(torch.empty(1, count, self.cfg.dim)) if count else None

    def reset_parameters(self) -> None:
        """Initialise every parameter: blocks as timm, patches Xavier, positions sine-cosine."""
        reset_children(self)
        self._reset_own()

    @torch.no_grad()
    def _reset_own(self) -> None:
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # a view: [D, 3 P P]
        assert self.patch_embed.bias is not None
        nn.init.zeros_(self.patch_embed.bias)
        if self.pos_embed is not None:
            self.pos_embed.copy_(grid_embedding(self.cfg.grid, self.dim, self.pos_embed.device))
        for prefix in (self.class_token, self.register_tokens):
            if prefix is not None:
                nn.init.normal_(prefix, std=PREFIX_STD)

    def embed(self, images: Tensor, masking: Masking | None = None) -> Tensor:
        """Embed patches with their absolute positions, without prefix: [B, 3, H, W] -> [B, N, D].

        H and W may differ from the configured size; positions are then interpolated. Raises
        ValueError where patches do not divide them.
        """
        height, width = images.shape[-2:]
        patch = self.cfg.patch_size
        if images.ndim != 4 or images.shape[1] != 3 or height % patch or width % patch:
            raise ValueError(
                f"images: expected [B, 3, H, W] with H and W multiples of patch_size = {patch}, "
                f"got {list(images.shape)}"
            )
        tokens = embed_patches(images, self.patch_embed.weight, self.patch_embed.bias)
        if masking is not None:
            hidden, token = masking
            tokens = torch.where(hidden[..., None], token.to(tokens.dtype), tokens)
        if self.pos_embed is None:
            return tokens
        old, new = (self.cfg.grid, self.cfg.grid), (height // patch, width // patch)
        return tokens + resample_grid(self.pos_embed, old, new)

    def places(self, images: Tensor) -> Tensor | None:
        """Return the centres of the patches of images [B, 3, H, W] as `encode` takes them.

        With rotary positions [B, N, 2] in (-1, 1); with absolute ones None.
        """
        if self.pos_embed is not None:
            return None
        rows, columns = (side // self.cfg.patch_size for side in images.shape[-2:])
        return patch_centres(rows, columns, images.device).expand(images.shape[0], -1, -1)

    def encode(
        self,
        tokens: Tensor,  # [B, n, D]
        centres: Tensor | None = None,  # [B, n, 2]
        priority: Tensor | None = None,  # [B, 2 depth] int32
    ) -> Tensor:  # [B, R + n, D]
        """Run the blocks on any subset of patch tokens; the prefix comes first in the result.

        centres: those of the tokens' patches, with rotary positions only; ValueError otherwise.
        priority: of every block's two branches, as `DropPath` takes it.
        """
        self._expect_centres(centres, "[B, n, 2]")
        stream = Residual(self.norm_pre(self._with_prefix(tokens)))
        rotation = None if centres is None else self._rotation(centres)
        for i, block in enumerate(self.blocks):
            own = layer_priorities(priority, i)
            stream = block(stream, rotation=rotation, priority=own)
        return self.norm(stream.total())

    def _with_prefix(self, tokens: Tensor) -> Tensor:  # [B, n, D] -> [B, R + n, D]
        prefix = [p for p in (self.class_token, self.register_tokens) if p is not None]
        if not prefix:
            return tokens
        return torch.cat([*(p.expand(tokens.shape[0], -1, -1) for p in prefix), tokens], 1)

    def _rotation(self, centres: Tensor) -> Tensor:  # [B, n, 2] -> [B, R + n, 2, D / H / 2]
        """Compute the rotations of all tokens; those of prefix tokens have the angle 0."""
        prefix = centres.new_zeros(centres.shape[0], self.num_prefix, 2)
        head_dim = self.cfg.dim // self.cfg.num_heads
        return rotary(torch.cat([prefix, centres], dim=1), head_dim)

    def forward(
        self, images: Tensor, priority: Tensor | None = None, masking: Masking | None = None
    ) -> Tensor:
        """Encode whole images: [B, 3, H, W] -> [B, R + N, D], prefix first.

        priority: [B, 2 depth] int32, as in `encode`.
        """
        return self.encode(self.embed(images, masking), self.places(images), priority)

    def encode_cells(
        self, images: Tensor, priority: Tensor | None = None, masking: Masking | None = None
    ) -> Tensor:
        """Encode whole images as one token a patch: [B, 3, H, W] -> [B, N, D].

        priority: [B, 2 depth] int32, as in `encode`.
        """
        return self(images, priority, masking)[:, self.num_prefix :]

    def encode_alone(
        self,
        images: Tensor,  # [B, 3, H, W]
        token_index: Tensor,  # [I, n] int64
        priority: Tensor | None = None,  # [I, 2 depth] int32
    ) -> Tensor:  # [I, n, D]
        """Encode each image's own cells without the others.

        token_index: the cells of input i % B that image i shows. priority: as in `encode`.
        """
        tokens, centres = take_cells(self.embed(images), token_index), self.places(images)
        if centres is not None:
            centres = take_cells(centres, token_index)
        return self.encode(tokens, centres, priority)[:, self.num_prefix :]

    def encode_views(
        self,
        images: Tensor,  # [B, 3, H, W]
        token_index: Tensor | None,  # [I, n] int64 as `encode_alone`
        local: Tensor,  # [L, 3, h, w]
        masking: Masking | None = None,  # of images, where no cells are given
    ) -> tuple[Tensor, Tensor]:  # [I, n, D] or [B, N, D], [L, m, D]
        """Encode images, alone where cells are given, and whole pictures of another size.

        As `encode_alone` or `encode_cells`, and `encode_cells`, with all products of both together;
        in two calls with rotary positions or stochastic depth, which are of whole batches, or where
        calls have to be apart (`calls_apart`).
        """
        of_batches = self.cfg.position != "absolute" or self.cfg.drop_path_rate > 0
        if self.calls_apart or of_batches:
            if token_index is None:
                return self.encode_cells(images, None, masking), self.encode_cells(local)
            return self.encode_alone(images, token_index), self.encode_cells(local)
        tokens = self.embed(images, masking)
        if token_index is not None:
            tokens = take_cells(tokens, token_index)
        whole = [self._with_prefix(tokens), self._with_prefix(self.embed(local))]
        packed = Packed(tuple(Sequences(*x.shape[:2]) for x in whole))
        stream = Residual(self.norm_pre(pack(whole)))
        for block in self.blocks:
            stream = block(stream, packed=packed)
        own, of_local = unpack(self.norm(stream.total()), packed.groups)
        return own[:, self.num_prefix :], of_local[:, self.num_prefix :]

    def encode_pictures(
        self,
        patches: Tensor,  # [T, 3 P P]
        grids: Tensor,  # [P, 2] int64, on the CPU
        priority: Tensor | None = None,  # [P, 2 depth] int32
    ) -> PackedTokens:
        """Encode whole pictures of any sizes and aspects, as `forward` each, without padding.

        patches: those of `cut_patches`, picture after picture. grids: rows and columns of patches
        of each picture. priority: as in `encode`. Raises ValueError as `encode_patches`.
        """
        return self.encode_patches(patches, whole_pictures(grids, patches.device), priority)

    def encode_patches(
        self,
        patches: Tensor,  # [T, 3 P P]
        cells: PackedCells,
        priority: Tensor | None = None,  # [sequences, 2 depth] int32
        mask_token: Tensor | None = None,  # [D]
    ) -> PackedTokens:
        """Encode any cells of pictures of any sizes, those of a sequence together.

        patches: of the cells, in their order. mask_token: embedding of those that are hidden.
        priority: as in `encode`. Raises ValueError as `encode_packed`, and where the patches are
        not as many as the cells.
        """
        lengths, place, extent, largest, hidden = cells
        size = 3 * self.cfg.patch_size**2
        if patches.shape != (sum(lengths), size):
            raise ValueError(
                f"patches: expected [{sum(lengths)}, {size}] for {len(lengths)} sequences, got "
                f"{list(patches.shape)}"
            )
        tokens = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        if hidden is not None:
            assert mask_token is not None
            tokens = torch.where(hidden[:, None], mask_token.to(tokens.dtype), tokens)
        if self.pos_embed is None:
            return self.encode_packed(tokens, lengths, grid_centres(place, extent), priority)
        tokens = tokens + resample_to_grids(
            self.pos_embed, self.cfg.grid, place, extent, largest=largest
        )
        return self.encode_packed(tokens, lengths, priority=priority)

    def encode_packed(
        self,
        tokens: Tensor,  # [T, D]
        lengths: Sequence[int],
        centres: Tensor | None = None,  # [T, 2]
        priority: Tensor | None = None,  # [P, 2 depth] int32
    ) -> PackedTokens:
        """Run the blocks on any patch tokens of pictures, each attending to its own alone.

        lengths: tokens of each picture, T in all. centres, priority: as in `encode`. Where products
        are in FP8, the rows of all pictures are filled up to a multiple of 16. Raises ValueError as
        `encode`, with stochastic depth by subset, which is of whole batches, and with
        another library's attention.
        """
        self._expect_centres(centres, "[T, 2]")
        self._expect_packable()
        num_prefix, count = self.num_prefix, len(lengths)
        packing = sort_by_length(
            lengths, num_prefix=num_prefix, multiple=self._row_multiple, device=tokens.device
        )
        prefix = tuple(p for p in (self.class_token, self.register_tokens) if p is not None)
        if prefix:
            of_all = torch.cat(prefix, 1).expand(count, -1, -1).flatten(0, 1)
            tokens = torch.cat([of_all, tokens])
        rotation = None
        if centres is not None:
            whole = torch.cat([centres.new_zeros(count * num_prefix, 2), centres])
            rotation = rotary(whole[packing.order], self.cfg.dim // self.cfg.num_heads)
        if priority is not None:
            priority = priority[packing.by_length]
        stream = Residual(self.norm_pre(tokens).index_select(0, packing.order))
        for i, block in enumerate(self.blocks):
            own = layer_priorities(priority, i)
            stream = block(stream, rotation=rotation, priority=own, packed=packing.packed)
        encoded = self.norm(stream.total()).index_select(0, packing.back)
        of_prefix, cells = encoded.tensor_split([count * num_prefix])
        return PackedTokens(of_prefix.unflatten(0, (count, num_prefix)), cells)

    def _expect_packable(self) -> None:
        cfg = self.cfg
        if self.training and cfg.drop_path_rate and cfg.drop_path_mode != "mask":
            raise ValueError(
                "drop_path_mode: expected mask with packed pictures, since which tokens a subset "
                f"leaves is not known on the host, got {cfg.drop_path_mode}"
            )
        if not all(isinstance(block.attention, Attention) for block in self.blocks):
            raise ValueError(
                "layers: expected attention by torch with packed pictures, got "
                f"{type(self.blocks[0].attention).__name__} of another library"
            )

    def _expect_centres(self, centres: Tensor | None, shape: str) -> None:
        if (centres is None) != (self.cfg.position == "absolute"):
            raise ValueError(
                f"centres: expected {'none' if centres is not None else shape} with position "
                f"= {self.cfg.position}, got {None if centres is None else list(centres.shape)}"
            )

    def summarise(self, tokens: Tensor) -> Tensor:
        """Return all tokens unchanged: [B, n, D]."""
        return tokens

    def layers_above(self, parameter: str) -> int:
        """Count the layers above a parameter, as timm does.

        The layers are patch embedding, positions, prefix and the norm before the blocks together,
        each block (the last one with the final norm), and the heads of the objective.
        """
        match parameter.split("."):
            case ["blocks", index, *_]:
                return self.cfg.depth - int(index)
            case ["norm", *_]:
                return 1
        return self.cfg.depth + 1
