"""ViT-B on pictures of any aspect: most of the run at low resolution, and a finish at a high one.

The terms of any_shape_m3i_vit_b are M3I's, in the values of m3i_vit_b. Those of the others are
SigLIP 2's (arXiv 2502.14786) that read whole pictures: captions by a sigmoid, and each view's
assignment to prototypes by the other, as DINO. NaFlex has 256 patches a picture, and as many as
1,024 at the end; here the first run draws from 64 on, as NaViT (arXiv 2307.06304) trains on
pictures of many resolutions. Values are chosen here, and not yet measured.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.models.vit import vit_b
from m3i_fast.config.objective.heads import ProjectorConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes.m3i_vit import m3i_vit_b

SIDE = 256  # 16 x 16 patches: those of NaFlex's low resolution, and of the table of positions
NUM_STEPS, FINISH = 200_000, 20_000


def any_shape_vit_b() -> TrainConfig:
    """Train ViT-B/16 by captions and prototypes on pictures of any aspect, 64 to 256 patches each.

    Needs: captioned pictures in a folder (--data.path); cards of 80 GB; 65,536 tokens a card.
    """
    views = ViewConfig(
        size=SIDE,
        size_range=(SIDE // 2, SIDE),
        scale=(0.3, 1.0),
        ratio=(0.5, 2.0),
        blur_probability=0.5,
        solarize_probability=0.1,
    )
    return TrainConfig(
        num_steps=NUM_STEPS,
        data=LoaderConfig(
            path=Path("data/train"),
            max_tokens_per_batch=65_536,
            global_views=views,
            num_threads=12,
        ),
        vision=vit_b(image_size=SIDE),
        objective=ObjectiveConfig(
            terms=(*METHODS["siglip"].terms, *METHODS["dino"].terms),
            mixing=MixingConfig(mode="none"),
            projector=ProjectorConfig(hidden_dim=2048, output_dim=256, num_layers=3),
            num_prototypes=16_384,
        ),
        optim=OptimConfig(lr=5e-4, weight_decay=0.05, betas=(0.9, 0.95), clip_grad_norm=1.0),
        ema=EmaConfig(momentum=0.994),
        log_every=50,
        checkpoint_every=2000,
    )


def any_shape_m3i_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with M3I on pictures of any aspect, 64 to 256 patches each.

    Needs: pictures with classes and captions; 8 cards of 80 GB; 131,072 tokens a card.
    """
    cfg = m3i_vit_b()
    views = replace(
        cfg.data.global_views, size=SIDE, size_range=(SIDE // 2, SIDE), ratio=(0.5, 2.0)
    )
    data = replace(cfg.data, global_views=views, max_tokens_per_batch=131_072)
    return replace(cfg, data=data, vision=vit_b(image_size=SIDE))


def any_shape_vit_b_finish() -> TrainConfig:
    """Train any_shape_vit_b on for a tenth of its steps, at 256 to 1,024 patches (--init run:DIR).

    Needs: the run of any_shape_vit_b and its pictures; cards of 80 GB; 65,536 tokens a card.
    """
    cfg = any_shape_vit_b()
    views = replace(cfg.data.global_views, size_range=(SIDE, 2 * SIDE))
    return replace(
        cfg,
        num_steps=FINISH,
        data=replace(cfg.data, global_views=views, seed=1),
        optim=replace(cfg.optim, lr=cfg.optim.lr / 10, warmup_fraction=0.05),
        ema=EmaConfig(momentum=0.999),
    )
