"""M3I with a Vision Transformer, for data sets of ImageNet's size.

Batch sizes are those of one card, chosen to fit 80 GB in bf16, and not yet measured. Steps and
learning rate are those of a node of eight.
"""

from __future__ import annotations

from m3i_fast.config.models.vit import vit_b, vit_h, vit_l, vit_s
from m3i_fast.config.train import TrainConfig
from m3i_fast.recipes.production import for_400_epochs


def m3i_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with M3I for 400 epochs of ImageNet, uncompiled.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 1024 pictures a card.
    """
    return for_400_epochs(vit_s(), 1024)


def m3i_vit_s_a100() -> TrainConfig:
    """Pre-train ViT-S/16 with M3I for 400 epochs of ImageNet, compiled for A100.

    Needs: pictures with classes and captions; 8 A100 cards of 80 GB; 1024 pictures a card.
    """
    return for_400_epochs(vit_s(), 1024, compile=True)


def m3i_vit_s_h100() -> TrainConfig:
    """Pre-train ViT-S/16 with M3I for 400 epochs of ImageNet, compiled for H100.

    Needs: pictures with classes and captions; 8 H100 cards of 80 GB; 1024 pictures a card.
    """
    return for_400_epochs(vit_s(), 1024, compile=True)


def m3i_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with M3I for 400 epochs of ImageNet, uncompiled.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 512 pictures a card.
    """
    return for_400_epochs(vit_b(), 512)


def m3i_vit_b_a100() -> TrainConfig:
    """Pre-train ViT-B/16 with M3I for 400 epochs of ImageNet, compiled for A100.

    Needs: pictures with classes and captions; 8 A100 cards of 80 GB; 512 pictures a card.
    """
    return for_400_epochs(vit_b(), 512, compile=True)


def m3i_vit_b_h100() -> TrainConfig:
    """Pre-train ViT-B/16 with M3I for 400 epochs of ImageNet, compiled for H100.

    Needs: pictures with classes and captions; 8 H100 cards of 80 GB; 768 pictures a card.
    """
    return for_400_epochs(vit_b(), 768, compile=True)


def m3i_vit_l() -> TrainConfig:
    """Pre-train ViT-L/16 with M3I for 400 epochs of ImageNet, uncompiled.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 256 pictures a card.
    """
    return for_400_epochs(vit_l(), 256)


def m3i_vit_l_a100() -> TrainConfig:
    """Pre-train ViT-L/16 with M3I for 400 epochs of ImageNet, compiled for A100.

    Needs: pictures with classes and captions; 8 A100 cards of 80 GB; 256 pictures a card.
    """
    return for_400_epochs(vit_l(), 256, compile=True)


def m3i_vit_l_h100() -> TrainConfig:
    """Pre-train ViT-L/16 with M3I for 400 epochs of ImageNet, compiled for H100.

    Needs: pictures with classes and captions; 8 H100 cards of 80 GB; 320 pictures a card.
    """
    return for_400_epochs(vit_l(), 320, compile=True)


def m3i_vit_h() -> TrainConfig:
    """Pre-train ViT-H/14 with M3I for 400 epochs of ImageNet, uncompiled.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 96 pictures a card.
    """
    return for_400_epochs(vit_h(drop_path_rate=0.1, activation_checkpointing="full"), 96)


def m3i_vit_h_a100() -> TrainConfig:
    """Pre-train ViT-H/14 with M3I for 400 epochs of ImageNet, compiled for A100.

    Needs: pictures with classes and captions; 8 A100 cards of 80 GB; 96 pictures a card.
    """
    return for_400_epochs(
        vit_h(drop_path_rate=0.1, activation_checkpointing="full"), 96, compile=True
    )


def m3i_vit_h_h100() -> TrainConfig:
    """Pre-train ViT-H/14 with M3I for 400 epochs of ImageNet, compiled for H100.

    Needs: pictures with classes and captions; 8 H100 cards of 80 GB; 128 pictures a card.
    """
    return for_400_epochs(
        vit_h(drop_path_rate=0.1, activation_checkpointing="full"), 128, compile=True
    )
