"""Image and text encoders; their sizes are configs in `m3i_fast.config`."""

from m3i_fast.models.internimage.model import Features, InternImage
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT

__all__ = ["Features", "InternImage", "TextEncoder", "ViT"]
