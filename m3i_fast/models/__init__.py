"""Image and text encoders."""

from m3i_fast.models.internimage.config import (
    InternImageConfig,
    internimage_b,
    internimage_demo,
    internimage_g,
    internimage_h,
    internimage_l,
    internimage_s,
    internimage_t,
    internimage_xl,
)
from m3i_fast.models.internimage.model import Features, InternImage
from m3i_fast.models.transformer.text import TextConfig, TextEncoder
from m3i_fast.models.transformer.vit import (
    ViT,
    ViTConfig,
    vit_b,
    vit_demo,
    vit_h,
    vit_l,
    vit_s,
    vit_ti,
)

__all__ = [
    "Features",
    "InternImage",
    "InternImageConfig",
    "TextConfig",
    "TextEncoder",
    "ViT",
    "ViTConfig",
    "internimage_b",
    "internimage_demo",
    "internimage_g",
    "internimage_h",
    "internimage_l",
    "internimage_s",
    "internimage_t",
    "internimage_xl",
    "vit_b",
    "vit_demo",
    "vit_h",
    "vit_l",
    "vit_s",
    "vit_ti",
]
