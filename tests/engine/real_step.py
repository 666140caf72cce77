"""A real training step on the CPU, of any config, on noise: what predictions are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TrainConfig
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.optim.ema import update_ema
from m3i_fast.engine.optim.optimizers import build_optimizer
from m3i_fast.engine.planning.memory import draw_first_mix
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers


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
