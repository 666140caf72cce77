"""A real training step on the CPU, of any config, on noise: what predictions are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.engine.ema import update_ema
from m3i_fast.engine.footprint import draw_first_mix
from m3i_fast.engine.model import build_objective
from m3i_fast.engine.optim import build_optimizer
from m3i_fast.models.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.pipelines.batch import Batch


def draw_batch(cfg: TrainConfig) -> Batch:
    """Views of noise; every picture has a label, a caption and a group of its own."""
    size, data = cfg.data.batch_size, cfg.data

    def views(side: int, count: int) -> tuple[Tensor, ...]:
        shape = size, 3, side, side
        return tuple(torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(count))

    local = data.local_views
    global_views = views(data.global_views.size, data.global_views.count)
    local_views = views(local.size, local.count) if local is not None else ()
    box = torch.tensor([1.0, 2.0, 50.0, 40.0, 0.0])
    sample_id = torch.arange(size)
    return Batch(
        global_views=global_views,
        local_views=local_views,
        boxes=box.expand(size, len(global_views) + len(local_views), 5).contiguous(),
        image_size=torch.full((size, 2), 60.0),
        token_ids=torch.ones(size, cfg.text.context_length, dtype=torch.int32),
        num_tokens=torch.full((size,), 5),
        label=sample_id % max(cfg.num_classes, 1),
        sample_id=sample_id,
        group_id=sample_id,
    )


def stepper(
    cfg: TrainConfig, *, bf16: bool = False, layers: BlockLayers = TORCH_LAYERS
) -> Callable[[], None]:
    """A function that takes one whole step: what `Trainer.train_step` does, without a loader."""
    torch.manual_seed(0)
    objective = build_objective(replace(cfg, compile=False), layers=layers).train()
    optimizer = build_optimizer(cfg.optim, objective)
    batch = draw_batch(cfg)
    mix = draw_first_mix(cfg)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            targets = objective.encode_targets(batch, mix)
            encoded = objective.encode_inputs(batch, mix)
            loss, _ = objective(encoded, targets, batch, mix)
        loss.backward()
        trained = [p for p in objective.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        for pair in objective.momentum_pairs():
            update_ema(*pair, momentum=0.9)

    return step
