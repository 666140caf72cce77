"""DINOv3 from random weights in its authors' values for ImageNet-1k, then its Gram anchoring.

Marked [DINOv3]: their configuration of ViT-L/16 on ImageNet-1k (vitl_im1k_lin834.yaml: 32 cards of
64 pictures, 125,000 steps), which is DINOv2's with rotary positions and balanced targets, and that
of the second stage of their 7B model (dinov3_vit7b16_gram_anchor.yaml). They distilled ViT-S and
ViT-B; what those have of their own, and the length and rate of the second stage at these sizes, are
chosen here, and not yet measured. The second begins from the average of the first one's encoder,
and draws its prototypes anew; small views weigh as in the first, where the authors halve them.
`m3i-fast methods --explain dinov3` says where the method differs; what else is not theirs,
recipes/dinov2_vit.py says, but for the two heads, which are.
"""

from __future__ import annotations

from dataclasses import replace

from m3i_fast.config.models.vit import ViTConfig, vit_b, vit_l, vit_s
from m3i_fast.config.objective.objective import Term
from m3i_fast.config.optim import EmaConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes.dinov2_vit import EPOCH, for_imagenet

GRAM_EPOCHS = 20


def dinov3_vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with DINOv3 in 125,000 steps of ImageNet, without Gram anchoring.

    Needs: pictures; 32 cards of 24 GB; 64 pictures a card.
    """
    return _pretrain(vit_s(drop_path_rate=0.1))


def dinov3_vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with DINOv3 in 125,000 steps of ImageNet, without Gram anchoring.

    Needs: pictures; 32 cards of 40 GB; 64 pictures a card.
    """
    return _pretrain(vit_b(drop_path_rate=0.1))


def dinov3_vit_l() -> TrainConfig:
    """Pre-train ViT-L/16 with DINOv3 in 125,000 steps of ImageNet, without Gram anchoring.

    Needs: pictures; 32 cards of 80 GB; 64 pictures a card.
    """
    return _pretrain(vit_l(drop_path_rate=0.3))  # [DINOv3]


def dinov3_vit_s_gram() -> TrainConfig:
    """Train a run of dinov3_vit_s on with Gram anchoring (--init run:RUN,which=ema).

    Needs: pictures; 32 cards of 24 GB; 64 pictures a card.
    """
    return _anchor(dinov3_vit_s())


def dinov3_vit_b_gram() -> TrainConfig:
    """Train a run of dinov3_vit_b on with Gram anchoring (--init run:RUN,which=ema).

    Needs: pictures; 32 cards of 40 GB; 64 pictures a card.
    """
    return _anchor(dinov3_vit_b())


def dinov3_vit_l_gram() -> TrainConfig:
    """Train a run of dinov3_vit_l on with Gram anchoring (--init run:RUN,which=ema).

    Needs: pictures; 32 cards of 80 GB; 64 pictures a card.
    """
    return _anchor(dinov3_vit_l())


def _pretrain(vision: ViTConfig) -> TrainConfig:
    terms = METHODS["dinov3"].terms
    without_gram = tuple(replace(t, weight=0.0) if t.target == "gram" else t for t in terms)
    return for_imagenet(replace(vision, position="rotary"), without_gram)  # [DINOv3]


def _anchor(cfg: TrainConfig) -> TrainConfig:
    """Give the cells' cosines a weight, and keep the rate low and the teacher slow."""
    terms = tuple(map(_anchored, cfg.objective.terms))
    return replace(
        cfg,
        num_steps=GRAM_EPOCHS * EPOCH,
        objective=replace(cfg.objective, terms=terms, snapshot_every=10_000),  # [DINOv3]
        optim=replace(
            cfg.optim,
            lr=cfg.optim.lr / 10,
            weight_decay=0.04,  # [DINOv3]
            final_weight_decay=0.04,  # [DINOv3]
        ),
        ema=EmaConfig(momentum=0.999, final_momentum=0.999),  # [DINOv3]
    )


def _anchored(term: Term) -> Term:
    if term.target == "gram":
        return replace(term, weight=2.0)  # [DINOv3] rising to it
    return replace(term, target_warmup_steps=0)  # [DINOv3] 0.07 by then
