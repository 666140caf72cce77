"""The trainable image encoders, selected by the type of their config."""

from __future__ import annotations

from m3i_fast.config.fields import refuse
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.vit import ViT


def build_encoder(cfg: VisionConfig, *, layers: BlockLayers = TORCH_LAYERS) -> ViT | InternImage:
    """Build the encoder of a config; ValueError where it has a head or gives no dense tokens."""
    refuse(cfg.encoder_conflicts())
    if isinstance(cfg, ViTConfig):
        return ViT(cfg, layers=layers)
    return InternImage(cfg, layers=layers)
