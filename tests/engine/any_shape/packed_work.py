"""What the ranks of test_packed_ranks.py run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.open_loader import open_loader
from m3i_fast.engine.trainer import Trainer
from tests.shared.engine.packed_run import in_double, packed_in_double_precision, split
from tests.shared.engine.two_ranks import full

NUM_STEPS = 3


@dataclass(frozen=True)
class Case:
    name: str
    cfg: TrainConfig
    accumulate: int = 1
    shard: int = 1
    all_labelled: bool = False
    """Give every picture a label: the share of labelled ones, a factor of the loss, is in fp32."""


def shares(pictures: int, number: int) -> list[int]:
    """So many unequal parts of some pictures, each of them at least one."""
    weights = [1 + (3 * part) % 4 for part in range(number)]
    counts = [max(pictures * weight // sum(weights), 1) for weight in weights]
    counts[-1] += pictures - sum(counts)
    assert min(counts) > 0 and (number == 1 or len(set(counts)) > 1)
    return counts


def run(case: Case, num_ranks: int, folder: Path, rank: int | None) -> dict[str, Tensor]:
    """Losses, norms and what is learnt, of a run on steps that are split among ranks and batches.

    rank: None for the one process that has the pictures of all in one batch.
    """
    accumulate = 1 if rank is None else case.accumulate
    parallel = ParallelConfig(shard=1 if rank is None else case.shard, accumulate=accumulate)
    cfg = replace(case.cfg, num_steps=NUM_STEPS, parallel=parallel)
    found: dict[str, Tensor] = {}
    with packed_in_double_precision():
        whole = open_loader(replace(case.cfg, parallel=ParallelConfig()))
        trainer = Trainer(cfg, folder / case.name)
        for step in range(NUM_STEPS):
            batch = in_double(next(whole))
            if case.all_labelled:
                batch = replace(batch, label=batch.sample_id % 9)
            mine: Sequence[int] = [0]
            parts = split(batch, [batch.batch_size])
            if rank is not None:
                images = cfg.objective.mixing.images_per_input
                inputs = shares(batch.batch_size // images, num_ranks * accumulate)
                parts = split(batch, [images * number for number in inputs])
                mine = [number * num_ranks + rank for number in range(accumulate)]
            metrics = trainer.train_step(*(parts[number] for number in mine), monitor=step == 0)
            for name, value in metrics.items():
                if name.startswith("loss/"):
                    found[f"{name} {step}"] = trainer.world.mean(value.clone())
            found[f"norm {step}"] = metrics["optim/grad_norm"].clone()
            assert trainer.train_step.samples_taken == whole.samples
        found |= {f"state/{k}": full(v) for k, v in trainer.objective.state_dict().items()}
        trainer.close()
        whole.close()
    return found


def work(rank: int, cases: list[Case], num_ranks: int, folder: Path) -> None:
    """One of `num_ranks` processes; leaves what `run` returns of each case."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    for case in cases:
        torch.save(run(case, num_ranks, folder, rank), folder / f"{case.name}-{rank}.pt")
    dist.destroy_process_group()


def train(rank: int, cfg: TrainConfig, num_ranks: int, folder: Path) -> None:
    """One of `num_ranks` processes of a whole run, which reads its own batches."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    Trainer(cfg, folder / "run").train()
    dist.destroy_process_group()
