"""What the processes of tests/engine/run/test_splits.py do: the same samples, shared out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.checkpoint.checkpoints import tensors_of
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.mixing import Mix
from m3i_fast.pipelines.batch import Batch
from m3i_fast.recipes import demo, shrink
from tests.shared.engine.drawn_data import DrawnData
from tests.shared.engine.parts_of_batches import in_double_precision, in_dtype
from tests.shared.engine.small_run import TEXT
from tests.shared.engine.two_ranks import full

NUM_STEPS = 20
WHOLE = 32  # samples a step


@dataclass(frozen=True)
class Split:
    """So many ranks, with so many samples in each of their accumulated batches."""

    ranks: int
    batch: int
    accumulate: int = 1

    def of(self, cfg: TrainConfig) -> TrainConfig:
        parallel = ParallelConfig(accumulate=self.accumulate)
        return replace(cfg, data=replace(cfg.data, batch_size=self.batch), parallel=parallel)


def small_config() -> TrainConfig:
    """M3I's terms that add up; with stochastic depth, token dropout, queries and accumulation."""
    cfg = shrink(demo(), path=Path("nowhere"), num_classes=9, text=TEXT)
    terms = []
    for term in cfg.objective.active_terms:
        if term.target == "features":
            terms.append(replace(term, regulariser="stop_gradient"))
        elif term.target == "category":
            terms.append(term)
    mixing = replace(
        cfg.objective.mixing,
        mask_block=1,
        dense_fraction=1.0,
        num_queries=3,
        min_contrast=0,
        token_dropout=0.3,
    )
    objective = replace(
        cfg.objective,
        terms=tuple(terms),
        mixing=mixing,
        balance=BalanceConfig(mode="uncertainty"),
    )
    return replace(
        cfg,
        num_steps=NUM_STEPS,
        num_threads=1,
        log_every=NUM_STEPS,
        checkpoint_every=NUM_STEPS,
        objective=objective,
        vision=replace(cfg.vision, drop_path_rate=0.3),
        optim=replace(cfg.optim, matrices="adamw", clip_grad_norm=0.1),
    )


def train(cfg: TrainConfig, out: Path, rank: int, ranks: int, *, until: int, resume: bool) -> dict:
    """Steps up to `until`, then a checkpoint: losses, weights, and what each position was given."""
    with in_double_precision():
        data = DrawnData(cfg, rank=rank, num_ranks=ranks)
        trainer = Trainer(cfg, out, resume=resume, new_batch_size=resume, data=data)
        seen = list[tuple[int, Batch, Mix]]()
        draw = trainer.train_step.draw_mix

        def noted(batch: Batch) -> Mix:
            seen.append((trainer.step, batch, draw(batch)))
            return seen[-1][2]

        trainer.train_step.draw_mix = noted  # type: ignore[method-assign]
        losses = {}
        while trainer.step < until:
            step = trainer.step
            batches = [in_dtype(next(data), True) for _ in range(cfg.parallel.accumulate)]
            metrics = trainer.train_step(*batches)
            losses[step] = trainer.world.mean(metrics["loss/total"].clone())
        trainer.save()
        assert trainer.train_step.samples_taken == data.samples
        tensors = tensors_of(trainer.objective, trainer.optimizer)
        found = {
            "losses": losses,
            "weights": {name: full(tensor) for name, tensor in tensors.items()},
            "given": [given(*each) for each in seen],
        }
        trainer.run.close()
    return found


def given(step: int, batch: Batch, mix: Mix) -> dict[str, Tensor]:
    """What stands at each position of a batch, a row a sample in order of position."""
    images, count = mix.members.shape[1], len(batch.position)
    assert mix.branch_priority is not None
    rows = {
        "step": torch.full((count,), step),
        "sample_id": batch.sample_id,
        "boxes": batch.boxes,
        "pixels": batch.global_views[1],
        "token_priority": mix.token_priority,
        "others of the input": batch.position[mix.members].repeat_interleave(images, 0),
        "choice": mix.choice.repeat_interleave(images, 0),
    }
    branches = mix.branch_priority.view(-1, mix.num_inputs, mix.branch_priority.shape[-1])
    rows["branches"] = branches.transpose(0, 1).flatten(1).repeat_interleave(images, 0)
    for name in ("token_index", "own_query", "other_query"):
        rows[name] = getattr(mix, name)[mix.sample.argsort()]
    return {"position": batch.position, **rows}


def sorted_by_position(of_ranks: Sequence[dict]) -> dict[str, Tensor]:
    """All that was given, of all ranks and batches, in order of position."""
    columns = defaultdict[str, list[Tensor]](list)
    for found in of_ranks:
        for batch in found["given"]:
            for name, rows in batch.items():
                columns[name].append(rows)
    joined = {name: torch.cat(rows) for name, rows in columns.items()}
    order = joined["position"].argsort()
    return {name: rows[order] for name, rows in joined.items()}


def work(rank: int, split: Split, cfg: TrainConfig, out: Path, until: int, resume: bool) -> None:
    torch.set_num_threads(1)
    name = f"store-{until}-{split.ranks}"
    store = dist.FileStore(str(out.parent / f"{out.name}-{name}"), split.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=split.ranks)
    found = train(split.of(cfg), out, rank, split.ranks, until=until, resume=resume)
    torch.save(found, out.parent / f"{out.name}-{until}-{rank}.pt")
    dist.destroy_process_group()


def run(
    split: Split, cfg: TrainConfig, out: Path, *, until: int = NUM_STEPS, resume: bool = False
) -> list[dict]:
    """What each rank of a split found, in processes of their own where there are several."""
    if split.ranks == 1:
        return [train(split.of(cfg), out, 0, 1, until=until, resume=resume)]
    arguments = (split, cfg, out, until, resume)
    mp.start_processes(work, arguments, nprocs=split.ranks, start_method="fork")
    files: Iterator[Path] = (out.parent / f"{out.name}-{until}-{r}.pt" for r in range(split.ranks))
    return [torch.load(file, weights_only=True) for file in files]
