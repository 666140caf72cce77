"""The image encoders that can be trained, told apart by their configs."""

from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.vit import ViTConfig

VisionConfig = ViTConfig | InternImageConfig
