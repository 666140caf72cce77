"""What the ranks of tests/engine/parallel/test_spread.py do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils._python_dispatch import TorchDispatchMode

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.build import build_objective, stacks_of
from m3i_fast.engine.parallel.local_shards import gradient_norm
from m3i_fast.engine.parallel.ranks import World, distribute
from m3i_fast.engine.train_step import ForwardPass
from m3i_fast.models.transformer.blocks import Block
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.objectives.mixing import draw_mix
from tests.shared.engine.two_ranks import NUM_RANKS, full

CPU = torch.device("cpu")


def work(rank: int, cases: dict[str, TrainConfig], folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    world = World(CPU, rank, NUM_RANKS, dist.group.WORLD, dist.group.WORLD)
    for name, cfg in cases.items():
        torch.save(_steps(cfg, world), folder / f"{name}-{rank}.pt")
    torch.save(reduced(world), folder / f"bf16-{rank}.pt")
    dist.destroy_process_group()


def _steps(cfg: TrainConfig, world: World) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients of two steps and losses; what was gathered and what ran in the second, in order."""
    torch.manual_seed(0)
    objective = build_objective(cfg, world.group, on_meta=True)
    stacks = stacks_of(objective)
    copies = [average for average, _ in objective.momentum_pairs()]
    model = distribute(
        ForwardPass(objective),
        stacks,
        cfg.parallel,
        world,
        compute_dtype=torch.float32,
        copies=copies,
    )
    torch.manual_seed(world.rank)
    batch, found, events = draw_batch(cfg, seed=world.rank), {}, list[str]()
    mix = draw_mix(
        cfg.objective.mixing,
        position=batch.position + world.rank * cfg.data.batch_size,
        first_position=0,
        grid=cfg.vision.grid,
        context_length=cfg.text.context_length,
        seed=0,
        step=0,
        num_steps=2,
    )
    for step in range(2):
        events.clear()
        with _noted(objective.encoder, events) if step else nullcontext():
            loss, _ = model(batch, mix, lambda _: nullcontext(), monitor=False, measure=False)
            events.append("backward")
            loss.backward()
        found[f"{step}/loss"] = loss.detach()
        for name, parameter in objective.named_parameters():
            if parameter.grad is not None:
                found[f"{step}/{name}"] = full(parameter.grad)
                with torch.no_grad():
                    parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return found, events


@contextmanager
def _noted(encoder: nn.Module, events: list[str]) -> Iterator[None]:
    """Of the encoder's blocks: `gather N` is the order to, `run N` the forward or backward pass."""
    blocks = {f"blocks.{n}": n for n in range(len(encoder.blocks))}  # type: ignore[arg-type]
    unshard = FSDPParamGroup.unshard
    hooks = []

    def gather(group: FSDPParamGroup, async_op: bool = False) -> None:
        name = str(group._module_fqn)
        number = blocks.get(name.removeprefix("objective.encoder."))
        if number is not None and not group.is_unsharded and group._all_gather_result is None:
            events.append(f"gather {number}")
        unshard(group, async_op)

    for number, block in enumerate(encoder.blocks):  # type: ignore[arg-type]

        def run(*_: object, number: int = number) -> None:
            events.append(f"run {number}")

        part = block.layernorm_mlp
        hooks += [part.register_forward_pre_hook(run), part.register_full_backward_pre_hook(run)]
    FSDPParamGroup.unshard = gather  # type: ignore[method-assign]
    try:
        yield
    finally:
        FSDPParamGroup.unshard = unshard  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()


class _Ops(TorchDispatchMode):
    """Counts indexing by a tensor: of a GPU's tensor by a list, the index is a copy to wait for."""

    num_indexed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_indexed += func is torch.ops.aten.index.Tensor
        return func(*args, **(kwargs or {}))


def reduced(world: World) -> dict[str, dict[str, Tensor]]:
    """Gradients of two blocks in bf16: as they are spread, and each rank's own of whole ones."""
    torch.manual_seed(0)
    spread = nn.Sequential(Block(32, 2), Block(32, 2))
    torch.manual_seed(0)
    whole = nn.Sequential(Block(32, 2), Block(32, 2)).bfloat16()
    distribute(
        spread, [list(spread)], ParallelConfig(shard=-1), world, compute_dtype=torch.bfloat16
    )
    torch.manual_seed(10 + world.rank)
    x = torch.randn(4, 6, 32).bfloat16()
    for model in (spread, whole):
        model(x).float().square().sum().backward()
    with _Ops() as ops:
        norm = gradient_norm([*(p.grad for p in spread.parameters()), torch.ones(3)])  # type: ignore[list-item]
    assert norm.each.shape == (len(list(spread.parameters())) + 1,)
    return {
        "stream": _streams(world),
        "norm": {"total": norm.total, "indexed": torch.tensor(ops.num_indexed)},
        "spread": {n: full(p.grad) for n, p in spread.named_parameters() if p.grad is not None},
        "own": {n: p.grad for n, p in whole.named_parameters() if p.grad is not None},
    }


def _streams(world: World) -> dict[str, Tensor]:
    """A text encoder in bf16: what its first block is given, by how its weights are kept."""
    found = {}
    for name, shard in (("whole", 1), ("spread", -1)):
        torch.manual_seed(0)
        encoder = TextEncoder(TextConfig(dim=32, depth=1, num_heads=2, vocab_size=50))
        given: list[Tensor] = []
        encoder.blocks[0].register_forward_pre_hook(lambda _, x, seen=given: seen.append(x[0][0]))
        model = distribute(
            encoder,
            [list(encoder.blocks)],
            ParallelConfig(shard=shard),
            world,
            compute_dtype=torch.bfloat16,
        )
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.arange(12).view(2, 6), torch.tensor([6, 4]))
        found[name] = given[0].detach()
    return found


def with_prefetch(cfg: TrainConfig, count: int, *, chunk: int = 0) -> TrainConfig:
    return replace(cfg, parallel=ParallelConfig(shard=-1, prefetch=count, chunk=chunk))
