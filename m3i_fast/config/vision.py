"""The image encoders that can be trained, told apart by their configs."""

from m3i_fast.config.internimage import InternImageConfig
from m3i_fast.config.vit import ViTConfig

VisionConfig = ViTConfig | InternImageConfig
