"""A run in which given steps are spoilt, and what two ranks do of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.guard import GuardConfig
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.parallel.local_shards import GradientNorm, local
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.step_context import Stage
from m3i_fast.pipelines.batch import Batch
from tests.shared.engine.replaced_step import replace_call
from tests.shared.engine.two_ranks import NUM_RANKS, full, spread

SHARDS = (1, -1)


class Poisoned(Trainer):
    """`poison`: a step of the run -> "loss", "gradient", or a factor of the loss that is told."""

    poison: Mapping[int, str | float]

    def poisoned(self, poison: Mapping[int, str | float]) -> Poisoned:
        self.poison, self.batches, self.rates = poison, list[list[int]](), list[float]()
        model, clip = self.train_step.model, self.train_step._clip
        forward, take = model.forward, self.train_step.__call__

        def spoilt(*arguments: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss, metrics = forward(*arguments, **options)
            kind = self.poison.get(self.step)
            if kind == "loss":  # the gradient stays finite: the loss alone tells
                metrics["loss/total"] = metrics["loss/total"] * float("inf")
            elif isinstance(kind, float):
                metrics["loss/total"] = metrics["loss/total"] * kind
            return loss, metrics

        def clipped(stage: Stage) -> GradientNorm:
            if self.poison.get(self.step) == "gradient":
                parts = local(p.grad for p in self.objective.parameters() if p.grad is not None)
                next(part for part in parts if part.numel()).view(-1)[0] = float("nan")
            return clip(stage)

        def noted(batch: Batch, *, monitor: bool = False) -> dict[str, Tensor]:
            self.batches.append(batch.sample_id.tolist())
            found = take(batch, monitor=monitor)
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            return found

        model.forward = spoilt  # type: ignore[method-assign]
        self.train_step._clip = clipped  # type: ignore[method-assign]
        replace_call(self, noted)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages, buffers, moments and step counts, whole."""
        kept = tensors_of(self.objective, self.optimizer)
        return {name: full(tensor) for name, tensor in kept.items()}


def work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    """Steps 1 and 2 are spoilt on the second rank alone, and so is the average of a last run."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    for shard in SHARDS:
        trainer = Poisoned(spread(cfg, shard), folder / f"run-{shard}")
        trainer.poisoned({1: "loss", 2: "gradient"} if rank else {})
        found: list[dict[str, Tensor]] = []
        step = trainer.train_step.__call__

        def noted(
            batch: Batch,
            *,
            monitor: bool = False,
            trainer: Poisoned = trainer,
            step: Any = step,
            found: list[dict[str, Tensor]] = found,
        ) -> dict[str, Tensor]:
            metrics = step(batch, monitor=monitor)
            found.append(trainer.tensors())
            return metrics

        replace_call(trainer, noted)
        trainer.train()
        torch.save([found, trainer.batches], folder / f"{shard}-{rank}.pt")
    guard = GuardConfig(spikes="rollback", spike_window=2, spike_deviations=50.0)
    cfg = replace(spread(cfg, 1), guard=guard, num_steps=6, log_every=5, checkpoint_every=2)
    trainer = Poisoned(cfg, folder / "back")
    poison: dict[int, str | float] = {4: 1e4} if rank else {}
    trainer.poisoned(poison).train(lambda step, _: poison.clear())
    torch.save(trainer.tensors(), folder / f"back-{rank}.pt")
    trainer = Poisoned(replace(cfg, log_every=2, checkpoint_every=100), folder / "average")
    if rank:
        trainer.objective.target_encoder.encoder.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 2: .*model/target_encoder.encoder.norm.we"):
        trainer.poisoned({}).train()
    dist.destroy_process_group()
