"""M3I that goes on from weights of DINOv2 or DINOv3, which `--init` names.

Steps are those of a first look at a data set of some hundred thousand pictures. The learning rate
is a tenth of that from random weights, and a layer's 0.9 of that of the next, so that the features
are kept at first; 0.9 is the default of DINOv2's and DINOv3's own code (`layerwise_decay` in
ssl_default_config.yaml), though DINOv2's ViT-L from random weights has 1. These and the batch
sizes, which fit a card of 80 GB in bf16 as `m3i-fast plan` predicts, are chosen here, and not yet
measured.
"""

from __future__ import annotations

from dataclasses import replace

from m3i_fast.config.models import vit
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.recipes.production import production


def dinov2_s() -> TrainConfig:
    """Train DINOv2's ViT-S/14 on with M3I, from its weights (--init dinov2:FILE).

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 80 GB; 512 pictures a card.
    """
    return _from_weights(vit.dinov2_s(), 512)


def dinov2_b() -> TrainConfig:
    """Train DINOv2's ViT-B/14 on with M3I, from its weights (--init dinov2:FILE).

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 80 GB; 256 pictures a card.
    """
    return _from_weights(vit.dinov2_b(), 256)


def dinov2_l() -> TrainConfig:
    """Train DINOv2's ViT-L/14 on with M3I, from its weights (--init dinov2:FILE).

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 80 GB; 128 pictures a card.
    """
    return _from_weights(vit.dinov2_l(), 128)


def dinov3_s() -> TrainConfig:
    """Train DINOv3's ViT-S/16 on with M3I, from its weights (--init dinov3:FILE).

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 80 GB; 512 pictures a card.
    """
    return _from_weights(vit.dinov3_s(), 512)


def dinov3_b() -> TrainConfig:
    """Train DINOv3's ViT-B/16 on with M3I, from its weights (--init dinov3:FILE).

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 80 GB; 256 pictures a card.
    """
    return _from_weights(vit.dinov3_b(), 256)


def dinov3_l() -> TrainConfig:
    """Train DINOv3's ViT-L/16 on with M3I, from its weights (--init dinov3:FILE).

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 80 GB; 128 pictures a card.
    """
    return _from_weights(vit.dinov3_l(), 128)


def _from_weights(vision: ViTConfig, batch_size: int) -> TrainConfig:
    cfg = production(vision, batch_size=batch_size, num_steps=50_000)
    return replace(cfg, optim=replace(cfg.optim, lr=cfg.optim.lr / 10, layer_decay=0.9))
