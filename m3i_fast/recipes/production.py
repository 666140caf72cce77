"""What the recipes at full size have in common.

Marked with where a value comes from: [paper] M3I, [SiameseIM] its base method; the rest is chosen
here, and not yet measured.
"""

from __future__ import annotations

from pathlib import Path

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.train import TrainConfig

NODE = 8  # cards whose pictures a step M3I's recipes are for
MIN_CONTRAST = 8  # of 255 levels: less is blank paper, sky, or JPEG's noise in either
IMAGENET_PICTURES = 1_281_167


def production(
    vision: VisionConfig,
    *,
    batch_size: int,
    num_steps: int,
    num_cards: int = 1,
    compile: bool = False,
) -> TrainConfig:
    """Make M3I on a captioned and labelled data set; values chosen where no source is marked.

    batch_size: pictures a card; the learning rate is that of `num_cards` of them.
    """
    colours = ViewConfig(
        size=vision.image_size,
        scale=(0.08, 1.0),  # [SiameseIM]
        blur_probability=0.5,  # [SiameseIM] 1.0 and 0.1 on its two views
        solarize_probability=0.1,  # [SiameseIM] 0.2 on one of two views
    )
    return TrainConfig(
        num_steps=num_steps,
        num_classes=1000,
        data=LoaderConfig(
            path=Path("data/train"),
            batch_size=batch_size,
            global_views=colours,
            num_threads=8,
        ),
        vision=vision,
        text=TextConfig(),  # [paper] CLIP's base text Transformer, from scratch
        objective=ObjectiveConfig(
            mixing=MixingConfig(  # [paper] two images, by blocks, about half and half, together
                mode="joint", mask_block=2, min_contrast=MIN_CONTRAST
            ),
            # [SiameseIM] depth, heads; its width is the encoder's, and so has the targets' rank
            decoder=DecoderConfig(dim=max(512, vision.dim), depth=4, num_heads=16),
        ),
        optim=OptimConfig(
            # [SiameseIM] 1e-3 at 4096, linear in the batch
            lr=6.25e-5 * 16 * num_cards * batch_size / 4096,
            weight_decay=0.05,  # [SiameseIM]
            betas=(0.9, 0.95),  # [SiameseIM]
            clip_grad_norm=1.0,  # [SiameseIM]
        ),
        ema=EmaConfig(momentum=0.995),  # [SiameseIM]
        compile=compile,
        log_every=50,
        checkpoint_every=2000,
    )


def for_400_epochs(vision: VisionConfig, batch_size: int, *, compile: bool = False) -> TrainConfig:
    """Make M3I for 400 epochs of 1.28 M images [paper, ablations on ImageNet-1k] on a node."""
    return production(
        vision,
        batch_size=batch_size,
        num_steps=400 * IMAGENET_PICTURES // (NODE * batch_size),
        num_cards=NODE,
        compile=compile,
    )
