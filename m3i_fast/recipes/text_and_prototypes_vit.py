"""SigLIP 2 and TIPS from random weights: captions, and prototypes of views and cells.

Marked [SigLIP 2]: what its paper (arXiv 2502.14786, section 2) tells of ViT-B and ViT-L. Marked
[TIPS]: what its paper's abstract and its authors' code of the model (scenic/) tell; training code
there is none, and its ViT-S, B and L are distilled from a larger one. The rest is chosen here, and
not yet measured. `m3i-fast methods --explain siglip2` and `tips` say where the methods differ. Not
theirs are, beside it: captions are tokenised as the data set says, patches are of 16 pixels, and
SigLIP 2's prototypes learn all through the run, at their weights of its last fifth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig, vit_b, vit_l, vit_s
from m3i_fast.config.objective.heads import CaptionerConfig, ProjectorConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.objectives.methods import METHODS

SIGLIP2_BATCH, SIGLIP2_PICTURES, SIGLIP2_WARMUP = 32_768, 40_000_000_000, 20_000  # [SigLIP 2]
TIPS_BATCH, TIPS_EPOCHS, TIPS_WARMUP = 16_384, 15, 0.05
TIPS_PICTURES = 117_000_000  # [TIPS]


def siglip2_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 at 256 pixels with SigLIP 2 on 40 billion captioned pictures.

    Needs: pictures with captions; 256 cards of 80 GB; 128 pictures a card.
    """
    return _siglip2(vit_s(image_size=256), num_cards=256, weight=0.25)


def siglip2_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 at 256 pixels with SigLIP 2 on 40 billion captioned pictures.

    Needs: pictures with captions; 512 cards of 80 GB; 64 pictures a card.
    """
    return _siglip2(vit_b(image_size=256), num_cards=512, weight=0.25)  # [SigLIP 2]


def siglip2_vit_l() -> TrainConfig:
    """Pre-train ViT-L/16 at 256 pixels with SigLIP 2 on 40 billion captioned pictures.

    Needs: pictures with captions; 1,024 cards of 80 GB; 32 pictures a card.
    """
    return _siglip2(vit_l(image_size=256), num_cards=1024, weight=0.5)  # [SigLIP 2]


def tips_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with TIPS for 15 epochs of 117 million captioned pictures.

    Needs: pictures with captions; 128 cards of 80 GB; 128 pictures a card.
    """
    return _tips(vit_s(class_token=True), num_cards=128)


def tips_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with TIPS for 15 epochs of 117 million captioned pictures.

    Needs: pictures with captions; 256 cards of 80 GB; 64 pictures a card.
    """
    return _tips(vit_b(class_token=True), num_cards=256)


def tips_vit_l() -> TrainConfig:
    """Pre-train ViT-L/16 with TIPS for 15 epochs of 117 million captioned pictures.

    Needs: pictures with captions; 512 cards of 80 GB; 32 pictures a card.
    """
    return _tips(vit_l(class_token=True), num_cards=512)


def _siglip2(vision: ViTConfig, *, num_cards: int, weight: float) -> TrainConfig:
    """weight: of views' prototypes; those of cells have a quarter of it [SigLIP 2]."""
    num_steps = SIGLIP2_PICTURES // SIGLIP2_BATCH
    cfg = _with_captions(
        "siglip2",
        vision,
        depth=vision.depth,  # [SigLIP 2]
        weights={"prototypes": weight, "cells": weight / 4},
        batch_size=SIGLIP2_BATCH // num_cards,
        num_steps=num_steps,
    )
    captioner = CaptionerConfig(
        dim=vision.dim,
        depth=vision.depth // 2,  # [SigLIP 2] half of the text encoder's
        num_heads=vision.num_heads,
        parallel=0.5,  # [SigLIP 2]
    )
    return replace(
        cfg,
        objective=replace(cfg.objective, captioner=captioner),
        optim=OptimConfig(
            lr=1e-3,  # [SigLIP 2]
            warmup_fraction=SIGLIP2_WARMUP / num_steps,
            weight_decay=1e-4,  # [SigLIP 2]
            final_weight_decay=1e-4,  # [SigLIP 2]
            clip_grad_norm=1.0,  # [SigLIP 2]
        ),
    )


def _tips(vision: ViTConfig, *, num_cards: int) -> TrainConfig:
    cfg = _with_captions(
        "tips",
        vision,
        depth=12,  # [TIPS]
        weights={},
        batch_size=TIPS_BATCH // num_cards,
        num_steps=TIPS_EPOCHS * TIPS_PICTURES // TIPS_BATCH,
    )
    optim = OptimConfig(lr=5e-4, warmup_fraction=TIPS_WARMUP, clip_grad_norm=1.0)
    return replace(cfg, optim=optim)


def _with_captions(
    name: str,
    vision: ViTConfig,
    *,
    depth: int,
    weights: Mapping[str, float],
    batch_size: int,
    num_steps: int,
) -> TrainConfig:
    """Make what both share. depth: text encoder's blocks; weights: of terms, 1 unless there."""
    method = METHODS[name]
    views = ViewConfig(size=vision.image_size, scale=(0.4, 1.0))
    local = replace(views, count=8, size=96, scale=(0.05, 0.4))  # [SigLIP 2] the number
    return TrainConfig(
        num_steps=num_steps,
        data=LoaderConfig(
            path=Path("data/train"),
            batch_size=batch_size,
            global_views=views,
            local_views=local,
            num_threads=8,
        ),
        vision=vision,
        text=TextConfig(
            context_length=64,  # [SigLIP 2] [TIPS]
            dim=vision.dim,  # [SigLIP 2] [TIPS]
            depth=depth,
            num_heads=vision.num_heads,
            embed_dim=vision.dim,
        ),
        objective=ObjectiveConfig(
            terms=tuple(replace(t, weight=weights.get(t.name, 1.0)) for t in method.terms),
            mixing=method.mixing,
            projector=ProjectorConfig(hidden_dim=2048, output_dim=256, num_layers=3),
            num_prototypes=32_768,
        ),
        ema=EmaConfig(momentum=0.996, final_momentum=0.996),
        log_every=50,
        checkpoint_every=2000,
    )
