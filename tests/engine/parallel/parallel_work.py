"""What the ranks of tests/engine/parallel/test_ranks.py run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.parallel.local_shards import GradientNorm
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.step_context import Stage
from m3i_fast.pipelines.loader import Loader
from tests.shared.engine.parts_of_batches import in_double_precision, in_dtype
from tests.shared.engine.two_ranks import full
from tests.shared.ranks import part


@dataclass(frozen=True)
class Case:
    name: str
    cfg: TrainConfig
    shard: int
    num_steps: int = 3
    double: bool = True
    chunk: int = 0


def run(case: Case, num_ranks: int, folder: Path, rank: int | None) -> dict[str, Tensor]:
    """Losses, gradients of the first step and the state after the last.

    rank: None for the one process that has the batches of all ranks.
    """
    cfg = replace(case.cfg, num_steps=case.num_steps, num_threads=1)
    all_data = cfg.data
    if rank is not None:
        data = replace(cfg.data, batch_size=cfg.data.batch_size // num_ranks)
        parallel = ParallelConfig(shard=case.shard, chunk=case.chunk)
        cfg = replace(cfg, data=data, parallel=parallel)
    with in_double_precision() if case.double else nullcontext():
        whole = Loader(all_data)
        trainer = Trainer(cfg, folder / case.name)
        found: dict[str, Tensor] = {}
        losses = []
        for step in range(case.num_steps):
            batch = in_dtype(next(whole), case.double)
            mine = batch if rank is None else part(batch, rank, num_ranks)
            if step == 0:
                _keep_gradients(trainer, found)
            metrics = trainer.train_step(mine, monitor=step == 0)
            losses.append(trainer.world.mean(metrics["loss/total"].clone()))
            found |= {f"pull/{k}": v.clone() for k, v in metrics.items() if "gradient" in k}
        found["losses"] = torch.stack(losses)
        found |= {f"state/{k}": full(v) for k, v in trainer.objective.state_dict().items()}
        trainer.loader.close()
        whole.close()
    return found


def _keep_gradients(trainer: Trainer, found: dict[str, Tensor]) -> None:
    """As they are after the ranks have reduced them and before they are clipped."""
    step = trainer.train_step
    clip = step._clip

    def kept(stage: Stage) -> GradientNorm:
        cfg = step.cfg
        step.cfg = replace(cfg, optim=replace(cfg.optim, clip_grad_norm=0.0))
        norm = clip(stage)
        for name, parameter in trainer.objective.named_parameters():
            if parameter.grad is not None:
                found[f"gradient/{name}"] = full(parameter.grad)
        found["norm"] = norm.total.detach().clone()
        step.cfg = cfg
        del step._clip  # type: ignore[attr-defined]
        return norm

    step._clip = kept  # type: ignore[method-assign]


def work(rank: int, cases: list[Case], num_ranks: int, folder: Path) -> None:
    """One of `num_ranks` processes; leaves what `run` returns of each case."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    for case in cases:
        torch.save(run(case, num_ranks, folder, rank), folder / f"{case.name}-{rank}.pt")
    dist.destroy_process_group()
