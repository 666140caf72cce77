"""M3I's objective on pictures of 32 pixels: config, model, batch and mix, the same every time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, m3i
from m3i_fast.objectives.mixing import Mix, draw_mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.pipelines.batch import Batch

VISION = vit_demo(image_size=32, dim=32, depth=2, num_heads=2)
TEXT = TextConfig(vocab_size=50, context_length=6, dim=32, depth=1, num_heads=2, embed_dim=16)
NUM_CLASSES = 5


def make_config(mode: str = "own_image", only: str | None = None) -> ObjectiveConfig:
    terms = tuple(replace(t, weight=float(only in (None, t.name))) for t in m3i())
    return ObjectiveConfig(
        terms=terms,
        mixing=MixingConfig(mode=mode, mask_block=1, num_queries=4),  # type: ignore[arg-type]
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
        head_hidden_dim=32,
    )


def build_model(cfg: ObjectiveConfig) -> MutualInformation:
    torch.manual_seed(0)
    return MutualInformation(cfg, vision=VISION, text=TEXT, num_classes=NUM_CLASSES)


def make_batch(size: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(1)
    views = [
        torch.randint(0, 256, (size, 3, 32, 32), generator=rng, dtype=torch.uint8) for _ in range(2)
    ]
    corner = torch.rand(size, 2, 2, generator=rng) * 10
    side = 20 + torch.rand(size, 2, 2, generator=rng) * 10
    flip = torch.randint(0, 2, (size, 2, 1), generator=rng).float()
    num_tokens = torch.tensor([3, 0, 6, 4, 0, 3, 5, 6, 2, 6, 0, 4])[:size]
    ids = torch.randint(1, 50, (size, 6), generator=rng, dtype=torch.int32)
    ids[torch.arange(6) >= num_tokens[:, None]] = 0
    return Batch(
        global_views=tuple(views),
        local_views=(),
        boxes=torch.cat([corner, side, flip], -1),
        image_size=torch.full((size, 2), 40.0),
        token_ids=ids,
        num_tokens=num_tokens,
        label=torch.tensor([0, 1, -1, 3, -1, 2, 4, -1, 0, 1, 2, 3])[:size],
        sample_id=torch.arange(size),
        group_id=torch.arange(size),
        position=torch.arange(size),
    )


def draw_small_mix(cfg: ObjectiveConfig, batch: Batch) -> Mix:
    return draw_mix(
        cfg.mixing,
        position=batch.position,
        first_position=0,
        grid=4,
        context_length=6,
        seed=0,
        step=0,
        num_steps=1,
    )


def loss_of(model: MutualInformation, batch: Batch, mix: Mix) -> tuple[Tensor, dict[str, Tensor]]:
    return model(model.encode_inputs(batch, mix), model.encode_targets(batch, mix), batch, mix)
