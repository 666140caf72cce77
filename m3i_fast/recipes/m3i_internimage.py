"""M3I with an InternImage, for data sets of ImageNet's size.

Batch sizes, those of one card of 80 GB in bf16, and rates of stochastic depth are chosen, and not
yet measured.
"""

from __future__ import annotations

from typing import Any

from m3i_fast.config.models.internimage import (
    internimage_b,
    internimage_g,
    internimage_h,
    internimage_l,
    internimage_s,
    internimage_t,
    internimage_xl,
)
from m3i_fast.config.train import TrainConfig
from m3i_fast.recipes.production import for_400_epochs

ENCODER: dict[str, Any] = {
    "num_classes": 0,
    "use_clip_projector": True,
}  # the terms have their own heads


def m3i_internimage_t() -> TrainConfig:
    """Pre-train InternImage-T, 30 M parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 768 pictures a card.
    """
    vision = internimage_t(**ENCODER, drop_path_rate=0.1)
    return for_400_epochs(vision, 768)


def m3i_internimage_s() -> TrainConfig:
    """Pre-train InternImage-S, 50 M parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 512 pictures a card.
    """
    vision = internimage_s(**ENCODER, drop_path_rate=0.1)
    return for_400_epochs(vision, 512)


def m3i_internimage_b() -> TrainConfig:
    """Pre-train InternImage-B, 97 M parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 384 pictures a card.
    """
    vision = internimage_b(**ENCODER, drop_path_rate=0.1)
    return for_400_epochs(vision, 384)


def m3i_internimage_l() -> TrainConfig:
    """Pre-train InternImage-L, 223 M parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 192 pictures a card.
    """
    vision = internimage_l(**ENCODER, drop_path_rate=0.1)
    return for_400_epochs(vision, 192)


def m3i_internimage_xl() -> TrainConfig:
    """Pre-train InternImage-XL, 335 M parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 128 pictures a card.
    """
    vision = internimage_xl(**ENCODER, drop_path_rate=0.1)
    return for_400_epochs(vision, 128)


def m3i_internimage_h() -> TrainConfig:
    """Pre-train InternImage-H, 1.09 B parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 64 pictures a card.
    """
    vision = internimage_h(**ENCODER, drop_path_rate=0.2, activation_checkpointing="full")
    return for_400_epochs(vision, 64)


def m3i_internimage_g() -> TrainConfig:
    """Pre-train InternImage-G, 3.08 B parameters, with M3I for 400 epochs of ImageNet.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 16 pictures a card.
    """
    vision = internimage_g(**ENCODER, drop_path_rate=0.4, activation_checkpointing="full")
    return for_400_epochs(vision, 16)
