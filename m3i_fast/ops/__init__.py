"""Fused operators with CPU and CUDA kernels; importing this package loads the compiled modules."""

from m3i_fast.ops import views
from m3i_fast.ops.add_layer_norm import add_layer_norm
from m3i_fast.ops.boltzmann import IGNORED, boltzmann
from m3i_fast.ops.boltzmann_rows import SoftTargets
from m3i_fast.ops.dcnv3 import dcnv3
from m3i_fast.ops.gaussian import gaussian
from m3i_fast.ops.mask_mix import IMAGENET_MEAN, IMAGENET_STD, mask_mix

__all__ = [
    "IGNORED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SoftTargets",
    "add_layer_norm",
    "boltzmann",
    "dcnv3",
    "gaussian",
    "mask_mix",
    "views",
]
