"""DINOv2 from random weights, in its authors' values for ImageNet-1k.

Marked [DINOv2]: their default configuration, which is that of ViT-L/16 on ImageNet-1k
(ssl_default_config.yaml, train/vitl16_short.yaml): 32 cards of 64 pictures, 125,000 steps. They
published none of ViT-S and ViT-B, which they distilled; what those have of their own is chosen
here, and not yet measured. `m3i-fast methods --explain dinov2` says where the method differs. Not
theirs are, beside it: blur and solarisation are drawn alike for both global views; the rate of
stochastic depth rises from layer to layer; the patch embedding learns at its layer's rate, not a
fifth of it; prototypes learn from the first step on, not from the second epoch, and have unit
length for good; views and cells have a head each; weight decay leaves the mask token out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.models.vit import ViTConfig, vit_b, vit_l, vit_s
from m3i_fast.config.objective.heads import ProjectorConfig
from m3i_fast.config.objective.objective import SHARPENING, ObjectiveConfig, Term
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.objectives.methods import METHODS

NUM_CARDS, PICTURES_A_CARD = 32, 64  # [DINOv2]
EPOCH = 1250  # [DINOv2] steps, which are two passes over ImageNet


def dinov2_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with DINOv2 in its authors' 125,000 steps of ImageNet.

    Needs: pictures; 32 cards of 24 GB; 64 pictures a card.
    """
    return for_imagenet(vit_s(drop_path_rate=0.1))


def dinov2_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with DINOv2 in its authors' 125,000 steps of ImageNet.

    Needs: pictures; 32 cards of 40 GB; 64 pictures a card.
    """
    return for_imagenet(vit_b(drop_path_rate=0.1))


def dinov2_vit_l() -> TrainConfig:
    """Pre-train ViT-L/16 with DINOv2 in its authors' 125,000 steps of ImageNet.

    Needs: pictures; 32 cards of 80 GB; 64 pictures a card.
    """
    return for_imagenet(vit_l(drop_path_rate=0.3))  # [DINOv2]


def for_imagenet(
    vision: ViTConfig, terms: tuple[Term, ...] = METHODS["dinov2"].terms
) -> TrainConfig:
    """Make the 125,000 steps that DINOv2's and DINOv3's configurations for ImageNet-1k share."""
    views = ViewConfig(
        scale=(0.32, 1.0),  # [DINOv2]
        blur_probability=0.5,  # [DINOv2] 1.0 and 0.1 on its two views
        solarize_probability=0.1,  # [DINOv2] 0.2 on one of two views
    )
    local = replace(
        views,
        count=8,  # [DINOv2]
        size=96,  # [DINOv2]
        scale=(0.05, 0.32),  # [DINOv2]
        solarize_probability=0.0,  # [DINOv2]
    )
    return TrainConfig(
        num_steps=100 * EPOCH,  # [DINOv2]
        data=LoaderConfig(
            path=Path("data/train"),
            batch_size=PICTURES_A_CARD,
            global_views=views,
            local_views=local,
            num_threads=8,
        ),
        vision=replace(vision, layer_scale_init=1e-5, drop_path_mode="subset"),  # [DINOv2]
        objective=ObjectiveConfig(
            terms=tuple(_halved(_warmed_up(term)) for term in terms),
            mixing=METHODS["dinov2"].mixing,  # [DINOv2] the mean of its mask ratios, 0.1 to 0.5
            projector=ProjectorConfig(hidden_dim=2048, output_dim=256, num_layers=3),  # [DINOv2]
            num_prototypes=65536,  # [DINOv2]
        ),
        optim=OptimConfig(
            lr=0.004 * (NUM_CARDS * PICTURES_A_CARD / 1024) ** 0.5,  # [DINOv2]
            final_lr=1e-6,  # [DINOv2]
            warmup_fraction=0.1,  # [DINOv2] 10 epochs of 100
            weight_decay=0.04,  # [DINOv2]
            final_weight_decay=0.4,  # [DINOv2]
            betas=(0.9, 0.999),  # [DINOv2]
            layer_decay=0.9,  # [DINOv2]
            clip_grad_norm=3.0,  # [DINOv2] of each of its modules
        ),
        ema=EmaConfig(momentum=0.992),  # [DINOv2] to 1
        log_every=50,
        checkpoint_every=2000,
    )


def _halved(term: Term) -> Term:
    """Let cells weigh half: theirs is a mean over all views, and half of them are not masked.

    [DINOv2] mask_sample_probability 0.5; here all views are masked.
    """
    return replace(term, weight=0.5) if term.target == "cell_prototypes" else term


def _warmed_up(term: Term) -> Term:
    """Let the teacher's temperature go from 0.04 to 0.07 in 30 epochs [DINOv2]."""
    if term.regulariser not in SHARPENING:
        return term
    return replace(term, target_temperature=0.07, target_warmup_steps=30 * EPOCH)
