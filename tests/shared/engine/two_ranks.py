"""A run that one process or two ranks can train, and its tensors whole on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.recipes import demo, shrink
from tests.shared.engine.small_run import TEXT

NUM_RANKS = 2
NUM_STEPS = 10


def run_of_adamw(dataset: Path) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    return replace(
        cfg,
        num_steps=NUM_STEPS,
        num_threads=1,
        checkpoint_every=3,
        keep_checkpoints=9,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw"),
    )


def spread(cfg: TrainConfig, shard: int) -> TrainConfig:
    """The same run on NUM_RANKS ranks."""
    data = replace(cfg.data, batch_size=cfg.data.batch_size // NUM_RANKS)
    return replace(cfg, data=data, parallel=ParallelConfig(shard=shard))


def full(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
