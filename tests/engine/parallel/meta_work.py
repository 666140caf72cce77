"""What the ranks of tests/engine/parallel/test_meta_init.py do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.build import build_objective, stacks_of
from m3i_fast.engine.parallel.local_shards import is_sharded, local
from m3i_fast.engine.parallel.ranks import World, distribute
from m3i_fast.engine.train_step import ForwardPass
from m3i_fast.models.internimage.deformable import InternImageLayer
from m3i_fast.models.transformer.blocks import Block

NUM_RANKS = 2
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    values: Values
    """Whole parameters and buffers."""
    shapes: dict[str, tuple[int, ...]]
    """Of this rank's parts of what is spread."""
    most_held: int
    """Elements in memory when a block had been drawn, the most of all blocks."""


def values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, those that are not saved too."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def held(model: nn.Module) -> int:
    real = [tensor for _, tensor in values(model) if not tensor.is_meta]
    return sum(part.numel() for part in local(real))


def work(rank: int, cases: dict[str, TrainConfig], folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    world = World(torch.device("cpu"), rank, NUM_RANKS, dist.group.WORLD, dist.group.WORLD)
    for name, cfg in cases.items():
        torch.save(vars(_make(cfg, world)), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def _make(cfg: TrainConfig, world: World) -> Made:
    torch.manual_seed(cfg.seed)
    objective = build_objective(cfg, world.group, on_meta=world.shards_weights(cfg.parallel))
    assert held(objective) == 0
    seen: list[int] = []
    for kind in (Block, InternImageLayer):
        reset = kind.reset_parameters

        def noted(block: nn.Module, reset=reset) -> None:  # type: ignore[no-untyped-def]
            reset(block)
            seen.append(held(objective))

        kind.reset_parameters = noted  # type: ignore[method-assign]
    copies = [average for average, _ in objective.momentum_pairs()]
    stacks = stacks_of(objective)
    distribute(
        ForwardPass(objective),
        stacks,
        ParallelConfig(shard=-1),
        world,
        compute_dtype=torch.float32,
        copies=copies,
    )
    found = dict(values(objective))
    return Made(
        {k: (v.full_tensor() if is_sharded(v) else v).detach() for k, v in found.items()},  # type: ignore[operator]
        {k: tuple(local([v])[0].shape) for k, v in found.items() if is_sharded(v)},
        max(seen),
    )
