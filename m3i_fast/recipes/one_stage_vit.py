"""One stage beside its parts on ImageNet-1k: M3I, SiameseIM and classification, all else alike.

Encoder, views, batches, optimiser and steps are those of M3I's recipe for all three
(`recipes.production`), so that a difference is of what is predicted. 8 cards x 512 pictures are
SiameseIM's batch of 4,096, with its learning rate. Nothing is tuned for any of them.
"""

from __future__ import annotations

from dataclasses import replace

from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import vit_b, vit_s
from m3i_fast.config.train import TrainConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes.production import IMAGENET_PICTURES, production

NUM_CARDS, PICTURES_A_CARD, NUM_EPOCHS = 8, 512, 100


def one_stage_m3i_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with M3I for 100 epochs of ImageNet, to compare it with its parts.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 512 pictures a card.
    """
    return _m3i(vit_s())


def one_stage_siameseim_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with SiameseIM for 100 epochs of ImageNet, to compare M3I with it.

    Needs: pictures; 8 cards of 80 GB; 512 pictures a card.
    """
    return _method("siameseim", vit_s())


def one_stage_supervised_vit_s() -> TrainConfig:
    """Train ViT-S/16 to classify for 100 epochs of ImageNet, to compare M3I with it.

    Needs: pictures with classes; 8 cards of 80 GB; 512 pictures a card.
    """
    return _method("supervised", vit_s())


def one_stage_m3i_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with M3I for 100 epochs of ImageNet, to compare it with its parts.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 512 pictures a card.
    """
    return _m3i(vit_b())


def one_stage_siameseim_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with SiameseIM for 100 epochs of ImageNet, to compare M3I with it.

    Needs: pictures; 8 cards of 80 GB; 512 pictures a card.
    """
    return _method("siameseim", vit_b())


def one_stage_supervised_vit_b() -> TrainConfig:
    """Train ViT-B/16 to classify for 100 epochs of ImageNet, to compare M3I with it.

    Needs: pictures with classes; 8 cards of 80 GB; 512 pictures a card.
    """
    return _method("supervised", vit_b())


def _m3i(vision: VisionConfig) -> TrainConfig:
    return production(
        vision,
        batch_size=PICTURES_A_CARD,
        num_steps=NUM_EPOCHS * IMAGENET_PICTURES // (NUM_CARDS * PICTURES_A_CARD),
        num_cards=NUM_CARDS,
    )


def _method(name: str, vision: VisionConfig) -> TrainConfig:
    cfg, method = _m3i(vision), METHODS[name]
    objective = replace(cfg.objective, terms=method.terms, mixing=method.mixing)
    return replace(cfg, objective=objective)
