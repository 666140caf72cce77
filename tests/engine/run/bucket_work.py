"""What a rank of tests/engine/run/test_bucket_reads.py does: a short run on a bucket."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer


def train(rank: int, ranks: int, cfg: TrainConfig, out: Path) -> None:
    dist.init_process_group("gloo", f"file://{out}.ranks", rank=rank, world_size=ranks)
    try:
        Trainer(cfg, out).train()
    finally:
        dist.destroy_process_group()
