"""M3I with a plain Vision Transformer, to start from with one's own pictures.

Steps are those of a first look at a data set of some hundred thousand pictures; `--num-steps` and
`--data.path` are what is set first. Classes and vocabulary are taken from the data. Batch sizes are
those that fit a card of 24 GB in bf16, as `m3i-fast plan` predicts; no card has confirmed them.

Beside an encoder narrower than ViT-B the text encoder has the encoder's width and half its depth,
which is half its blocks' parameters (CLIP's ViT-B/16: 0.44), in heads of 64 as CLIP's; the decoder
has the encoder's width, four blocks as every recipe's, and heads of 32 as MAE's.
"""

from __future__ import annotations

from dataclasses import replace

from m3i_fast.config.models import vit
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.recipes.production import production


def vit_ti() -> TrainConfig:
    """Pre-train ViT-Ti/16 with M3I on your own pictures.

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 24 GB; 384 pictures a card.
    """
    return _in_proportion(vit.vit_ti(), batch_size=384)


def vit_s() -> TrainConfig:
    """Pre-train ViT-S/16 with M3I on your own pictures.

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 24 GB; 256 pictures a card.
    """
    return _in_proportion(vit.vit_s(), batch_size=256)


def vit_b() -> TrainConfig:
    """Pre-train ViT-B/16 with M3I on your own pictures.

    Needs: pictures packed by `m3i-fast data` (--data.path); a card of 24 GB; 128 pictures a card.
    """
    return production(vit.vit_b(), batch_size=128, num_steps=50_000)


def _in_proportion(vision: ViTConfig, *, batch_size: int) -> TrainConfig:
    cfg, dim = production(vision, batch_size=batch_size, num_steps=50_000), vision.dim
    text = TextConfig(dim=dim, depth=vision.depth // 2, num_heads=dim // 64, embed_dim=dim)
    decoder = DecoderConfig(dim=dim, depth=4, num_heads=dim // 32)
    return replace(cfg, text=text, objective=replace(cfg.objective, decoder=decoder))
