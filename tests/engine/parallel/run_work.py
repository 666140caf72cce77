"""What the ranks of tests/engine/parallel/test_runs.py do: whole runs, stopped and resumed ones."""

from __future__ import annotations

import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.batch import Batch
from tests.shared.engine.drawn_data import DrawnData
from tests.shared.engine.replaced_step import replace_call
from tests.shared.engine.two_ranks import NUM_RANKS, full, spread

SHARDS = (1, -1)


class Watched:
    """A run that notes which samples it sees."""

    def __init__(self, cfg: TrainConfig, out: Path, *, resume: bool = False) -> None:
        rank, num_ranks = 0, 1
        if dist.is_initialized():
            rank, num_ranks = dist.get_rank(), dist.get_world_size()
        data = DrawnData(cfg, rank=rank, num_ranks=num_ranks)
        self.trainer, self.seen = Trainer(cfg, out, resume=resume, data=data), list[Tensor]()
        step = self.trainer.train_step.__call__

        def noted(batch: Batch, *, monitor: bool = False) -> dict[str, Tensor]:
            self.seen.append(batch.sample_id.clone())
            return step(batch, monitor=monitor)

        replace_call(self.trainer, noted)

    def train(self, *, stop_at: int | None = None) -> dict[str, Tensor]:
        """All that is saved, whole, and the samples; `stop_at`: this rank is told to stop there."""

        def heed(step: int, _: dict[str, float]) -> None:
            if step == stop_at:
                signal.raise_signal(signal.SIGUSR1)

        self.trainer.train(heed)
        return self.state()

    def state(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.trainer.objective, self.trainer.optimizer)
        found = {name: full(tensor) for name, tensor in tensors.items()}
        if self.seen:
            found["samples"] = torch.stack(self.seen)
        return found


def work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    for shard in SHARDS:
        mine = spread(cfg, shard)

        def keep(name: str, found: dict[str, Tensor], shard: int = shard) -> None:
            torch.save(found, folder / f"{name}-{shard}-{rank}.pt")

        keep("whole", Watched(mine, folder / f"whole-{shard}").train())
        first = Watched(mine, folder / f"part-{shard}")
        keep("first", first.train(stop_at=4 if rank == 1 else None))
        keep("second", Watched(mine, folder / f"part-{shard}", resume=True).train())
        alone = Watched(mine, folder / f"alone-{shard}", resume=True)
        keep("of one", alone.state())
        alone.train()
    dist.destroy_process_group()
