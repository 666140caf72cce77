"""What the ranks of tests/engine/test_initial_weights.py do: begin, and take a step."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.engine.trainer import Trainer
from tests.shared.engine.drawn_data import DrawnData
from tests.shared.engine.two_ranks import NUM_RANKS, full, spread


def begun(cfg: TrainConfig, out: Path, *, rank: int = 0, num_ranks: int = 1) -> dict[str, Tensor]:
    """All weights of the model as it begins, and those of its encoder after a step."""
    trainer = Trainer(cfg, out, data=DrawnData(cfg, rank=rank, num_ranks=num_ranks))
    found = {f"begun/{name}": full(v) for name, v in trainer.objective.state_dict().items()}
    trainer.next_step()
    after = trainer.objective.encoder.state_dict()
    found |= {f"after/{name}": full(value) for name, value in after.items()}
    trainer.close()
    return found


def work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    for shard in (1, -1):
        mine = spread(cfg, shard)
        found = begun(mine, folder / f"run-{shard}", rank=rank, num_ranks=NUM_RANKS)
        torch.save(found, folder / f"{shard}-{rank}.pt")
    dist.destroy_process_group()
