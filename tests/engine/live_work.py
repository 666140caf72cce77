"""What the ranks of tests/engine/test_live_evaluation.py do: runs with evaluations and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from m3i_fast.config import TrainConfig
from m3i_fast.engine.live_evaluation import UnreadableRowsError
from m3i_fast.engine.trainer import Trainer
from tests.shared.engine.two_ranks import NUM_RANKS, spread

SHARDS = (1, -1)


def work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    """A run with evaluations and one without, by DDP and by FSDP2, and values of each rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    for shard in SHARDS:
        mine = spread(cfg, shard)
        Trainer(replace(mine, evaluate_every=0), folder / f"without-{shard}").train()
        trainer = Trainer(mine, folder / f"with-{shard}")
        seen: list[dict[str, float]] = []
        trainer.train(lambda step, values, seen=seen: seen.append(values))  # type: ignore[misc]
        values = [v for v in seen if "evaluate/knn_top1" in v]
        torch.save(values, folder / f"values-{shard}-{rank}.pt")
    dist.destroy_process_group()


def fail(rank: int, cfg: TrainConfig, folder: Path) -> None:
    """A run whose evaluation reads a picture that one rank alone cannot decode."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    try:
        Trainer(spread(cfg, -1), folder / "run").train()
    except UnreadableRowsError as error:
        (folder / f"error-{rank}").write_text(str(error))
    dist.destroy_process_group()
