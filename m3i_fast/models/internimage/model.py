"""InternImage (arXiv 2211.05778): an encoder of deformable convolutions.

Keys, shapes and outputs are those of the official code. Legend: B images, N = H/16 * W/16 cells,
D width of a dense token, E width of the pooled vector.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from m3i_fast.config.models.internimage import COARSEST_STRIDE, InternImageConfig
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.internimage.attention_pool import AttentionPool
from m3i_fast.models.internimage.deformable import (
    LayerOptions,
    SamplingCore,
    Stage,
    Stem,
    norm_last,
    to_channels_first,
)
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.layers import Linear, reset_children
from m3i_fast.ops import dcnv3

HEAD_RATIO = 1.5  # width of the classification head over the last stage's


@dataclass(frozen=True, slots=True)
class Features:
    """Dense tokens and the attention-pooled vector of B images."""

    tokens: Tensor  # [B, N, D], row by row at stride 16
    pooled: Tensor  # [B, E]


DEFAULT = InternImageConfig()


class InternImage(ImageEncoder):
    """InternImage classifier and encoder: `InternImage(internimage_b(), num_classes=0)`.

    Keyword arguments replace fields of `cfg` (lists may stand for tuples), so that those of the
    official constructor work: `InternImage(channels=64, depths=[4, 4, 18, 4], groups=[4, 8, 16,
    32])`. core: a function with the signature of `m3i_fast.ops.dcnv3`, the default. layers:
    `linear` builds the projections and MLPs, `checkpoint` recomputes them. On the meta device
    `to_empty` and then `reset_parameters` give the weights of a direct build.

    Raises TypeError for an unknown keyword and ValueError for a value that does not fit.
    """

    def __init__(
        self,
        cfg: InternImageConfig = DEFAULT,
        *,
        core: SamplingCore = dcnv3,
        layers: BlockLayers = TORCH_LAYERS,
        **overrides: Any,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()
        }
        self.cfg = cfg = replace(cfg, **given)
        self.dim, self.summary_dim = cfg.dim, cfg.summary_dim
        self.patch_embed = Stem(cfg.channels)
        self.levels = nn.ModuleList(_stages(cfg, core, layers))
        self._columns = [2 * num_layers for num_layers in cfg.depths]  # of priorities
        width = cfg.channels * 2**3
        if cfg.use_clip_projector:
            patches = nn.Conv2d(width, 4 * cfg.token_dim, 1)
            self.dcnv3_head_x4 = nn.Sequential(patches, nn.PixelShuffle(2))
            self.dcnv3_head_x3 = nn.Conv2d(width // 2, cfg.token_dim, 1)
            self.clip_projector = AttentionPool(
                cfg.token_dim, num_heads=cfg.pool_heads, output_dim=cfg.pooled_dim
            )
            self.fc_norm = norm_last(cfg.pooled_dim)
            head_dim = cfg.pooled_dim
        else:
            head_dim = int(width * HEAD_RATIO)
            self.conv_head = nn.Sequential(
                nn.Conv2d(width, head_dim, 1, bias=False),
                nn.Sequential(nn.BatchNorm2d(head_dim)),
                nn.GELU(),
            )
        self.head = Linear(head_dim, cfg.num_classes) if cfg.num_classes else nn.Identity()

    def reset_parameters(self) -> None:
        """Initialise every parameter as the official code does."""
        reset_children(self)

    def forward_stages(
        self, images: Tensor, priority: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the maps of the four stages, [B, H/4, W/4, C] to [B, H/32, W/32, 8 C].

        images: [B, 3, H, W]. Sides that are no multiples of the stride are rounded up. priority:
        [B, 2 L] int32 of both branches of all L layers, as `DropPath` takes it. Raises ValueError
        for an input of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        x = self.patch_embed(images)
        maps = []
        of_stages = [None] * 4 if priority is None else priority.split(self._columns, 1)
        for level, own in zip(self.levels, of_stages, strict=True):
            stage_map, x = level(x, own)
            maps.append(stage_map)
        first, second, third, fourth = maps
        return first, second, third, fourth

    def encode_cells(self, images: Tensor, priority: Tensor | None = None) -> Tensor:
        """Encode images as dense tokens at stride 16: [B, 3, H, W] -> [B, N, D].

        Stage 3 and the pixel-shuffled stage 4 are added. priority: as in `forward_stages`. Raises
        ValueError where H or W is no multiple of 32, or without use_clip_projector.
        """
        self._need_projector("dense tokens")
        if any(side % COARSEST_STRIDE for side in images.shape[-2:]):
            raise ValueError(
                f"images: expected [B, 3, H, W] with H and W multiples of {COARSEST_STRIDE}, "
                f"got {list(images.shape)}"
            )
        *_, third, fourth = self.forward_stages(images, priority)
        fine = self.dcnv3_head_x3(to_channels_first(third))
        coarse = self.dcnv3_head_x4(to_channels_first(fourth))
        return (fine + coarse).flatten(2).transpose(1, 2)

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool any cells of an image, in any order, by attention: [B, n, D] -> [B, E].

        Raises ValueError without use_clip_projector.
        """
        self._need_projector("attention pooling")
        return self.fc_norm(self.clip_projector(tokens))

    def summarise(self, tokens: Tensor) -> Tensor:
        """Return the pooled vector as the single token of a summary: [B, n, D] -> [B, 1, E]."""
        return self.pool(tokens)[:, None]

    def forward_features(self, images: Tensor) -> Features:
        """Return the dense tokens and the pooled vector, which M3I trains, of [B, 3, H, W].

        Raises ValueError as `encode_cells` does.
        """
        tokens = self.encode_cells(images)
        return Features(tokens, self.pool(tokens))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images: [B, 3, H, W] -> logits [B, num_classes], or features without a head."""
        if self.cfg.use_clip_projector:
            return self.head(self.pool(self.encode_cells(images)))
        last = to_channels_first(self.forward_stages(images)[-1])
        # torch 2.13 compiles adaptive_avg_pool2d of a single cell to one without gradient
        return self.head(self.conv_head(last).mean((2, 3)))

    def layers_above(self, parameter: str) -> int:
        """Count the blocks above a parameter, as the official `lr_decay_keywards` does.

        The stem counts as part of the first block, the norm and downsampling after a stage's blocks
        as part of the next stage's first block, and the heads as part of the last block.
        """
        depths = self.cfg.depths
        match parameter.split("."):
            case ["patch_embed", *_]:
                block = 0
            case ["levels", level, "blocks", index, *_]:
                block = sum(depths[: int(level)]) + int(index)
            case ["levels", level, *_]:
                block = sum(depths[: int(level) + 1])
            case _:
                block = sum(depths)
        return max(sum(depths) - 1 - block, 0)

    def _need_projector(self, what: str) -> None:
        if not self.cfg.use_clip_projector:
            raise ValueError(f"use_clip_projector: expected True for {what}, got False")


def _stages(cfg: InternImageConfig, core: SamplingCore, layers: BlockLayers) -> list[Stage]:
    options = LayerOptions(
        mlp_ratio=cfg.mlp_ratio,
        layer_scale=cfg.layer_scale,
        offset_scale=cfg.offset_scale,
        post_norm=cfg.post_norm,
        res_post_norm=cfg.res_post_norm,
        dw_kernel_size=cfg.context_size,
        center_feature_scale=cfg.center_feature_scale,
        drop_path_mode=cfg.drop_path_mode,
        activation_checkpointing=cfg.activation_checkpointing,
        core=core,
        layers=layers,
    )
    rates = [cfg.drop_path(layer) for layer in range(sum(cfg.depths))]
    stages = []
    for i, num_layers in enumerate(cfg.depths):
        first = sum(cfg.depths[:i])
        stages.append(
            Stage(
                cfg.channels * 2**i,
                cfg.groups[i],
                options,
                drop_path=rates[first : first + num_layers],
                downsample=i < 3,
                post_norm_ids=(cfg.level2_post_norm_block_ids or ()) if i == 2 else (),
            )
        )
    return stages
