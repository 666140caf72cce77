"""Several processes that train one model: who they are, what each holds, what they agree on.

One optimiser step is the same whatever the number of ranks and however state is spread: every
rank's gradient is the mean over ranks, every rank sees the loss of the whole batch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.parallel.local_shards import is_sharded
from m3i_fast.engine.parallel.meta_init import initialise, is_on_meta
from m3i_fast.engine.parallel.rendezvous import meet
from m3i_fast.engine.parallel.watchdog import INIT_MINUTES


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees it."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """All ranks; None where there is one process."""
    control: dist.ProcessGroup | None = None
    """All ranks over gloo: small numbers of the host, for which no device is waited for."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks, in place; no rank waits for its device."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Over the ranks, in place; no rank waits for its device."""
        return self.sum(values).div_(self.size)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's, in their order; a small one, which the host has."""
        if self.control is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait_for_all(self) -> None:
        """Until every rank has come here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def shards_weights(self, cfg: ParallelConfig) -> bool:
        """Tell whether no rank holds all weights."""
        return self.group is not None and (self.size if cfg.shard == -1 else cfg.shard) > 1

    def mesh(self, cfg: ParallelConfig) -> DeviceMesh | None:
        """(replicate, shard), or None where every rank holds all.

        Raises ValueError where the ranks cannot be dealt into groups of parallel.shard.
        """
        shard = self.size if cfg.shard == -1 else cfg.shard
        if self.size % shard:
            raise ValueError(
                f"parallel.shard: expected a divisor of the {self.size} ranks, got {cfg.shard}"
            )
        if shard == 1:
            return None
        sizes = (self.size // shard, shard)
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=("replicate", "shard"))


def join_world(device: torch.device, *, seconds: float = 60 * INIT_MINUTES) -> World:
    """The world that torchrun describes in the environment, one process without it.

    Initialises torch.distributed unless that has been done: NCCL on GPUs, one a process, gloo on
    CPUs. Raises MissingRanks where not every rank has come here within `seconds`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        return World(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = meet(seconds)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            device_id=device if device.type == "cuda" else None,
        )
    group = dist.group.WORLD
    assert group is not None
    control = dist.new_group(backend="gloo") if device.type == "cuda" else group
    return World(device, dist.get_rank(), dist.get_world_size(), group, control)


def leave_world() -> None:
    """Undo `join_world`, so that a process ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(
    model: nn.Module,
    stacks: Sequence[Sequence[nn.Module]],
    cfg: ParallelConfig,
    world: World,
    *,
    compute_dtype: torch.dtype,
    copies: Sequence[nn.Module] = (),
) -> nn.Module:
    """`model` as the ranks run it; its forward is what gradients are reduced by.

    stacks: of blocks that run one after another, each gathered by itself where weights are spread;
    a model on the meta device is then initialised here, `copies` being what it fills from others.
    Scalars stay whole: FSDP2 does not split them, and `average_replicated` reduces their gradients.
    """
    if world.group is None:
        return model
    mesh = world.mesh(cfg)
    if mesh is None:
        with warnings.catch_warnings():  # torch 2.13 has another name that 2.10 does not know
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                broadcast_buffers=False,  # statistics are of all ranks already
                gradient_as_bucket_view=True,
            )
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]
    low = compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,
    )
    share = partial(fully_shard, mesh=mesh, mp_policy=policy)
    blocks = [block for stack in stacks for block in stack]
    if is_on_meta(model):
        initialise(model, blocks, world.device, copies=copies, share=share)
    else:
        for block in blocks:
            share(block)
    for stack in stacks:
        prefetch(stack, cfg.prefetch)
    scalars = {p for p in model.parameters() if p.ndim == 0}
    share(model, ignored_params=scalars)  # in place
    return model


def prefetch(stack: Sequence[nn.Module], count: int) -> None:
    """Have each of a stack's blocks gather the `count` that come after it, either way."""
    for way, method in (
        (stack, FSDPModule.set_modules_to_forward_prefetch),
        (stack[::-1], FSDPModule.set_modules_to_backward_prefetch),
    ):
        for place, block in enumerate(way, start=1):
            method(block, way[place : place + count])  # type: ignore[arg-type]


def average_replicated(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average over ranks the gradients of what is replicated, where all else is sharded.

    Where nothing is sharded, DDP has averaged them.
    """
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = [g for g in found if not is_sharded(g)]
    if gradients and len(gradients) < len(found):
        flat = world.mean(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))


class StopFlag:
    """A signal that one rank received, heeded by all of them after the same step."""

    def __init__(self, world: World) -> None:
        self.signal: int | None = None
        self._world = world
        self._asked: tuple[Tensor, dist.Work] | None = None

    def agreed(self) -> int | None:
        """What any rank had when all last called this, and asks anew; nobody waits for it."""
        group = self._world.control
        if group is None:
            return self.signal
        found = self.wait()
        value = torch.tensor([self.signal or 0])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None
        self._asked = value, work
        return found

    def wait(self) -> int | None:
        """The answer to what was last asked."""
        if self._asked is None:
            return None
        value, work = self._asked
        work.wait()
        self._asked = None
        return int(value) or None
