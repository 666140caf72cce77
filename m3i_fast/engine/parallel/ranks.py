"""The ranks of a run: how they join, how a model is distributed over them, what they agree on.

One optimiser step is the same whatever the number of ranks and however the state is sharded: every
rank's gradient is the mean over ranks, and every rank sees the loss of the whole batch.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.backward_threads import release_last_backward
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.parallel.local_shards import is_sharded
from m3i_fast.engine.parallel.meta_init import initialise, is_on_meta
from m3i_fast.engine.parallel.rendezvous import join_store
from m3i_fast.engine.parallel.watchdog import INIT_MINUTES

PATIENCE = timedelta(days=1)
"""How long ranks wait for each other. It is the `Watchdog` that ends a run that hangs, at its
limits, which torch's own ten minutes over NCCL and thirty over gloo would come before."""


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, as one of them sees it."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """Process group of all ranks; None for a single process."""
    control: dist.ProcessGroup | None = None
    """All ranks over gloo, which exchanges small host values without a wait for the device."""

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce the sum over ranks, in place, without a host synchronisation."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """All-reduce the mean over ranks, in place, without a host synchronisation."""
        return self.sum(values).div_(self.size)

    def gather(self, value: Any) -> list[Any]:
        """Return the small, picklable host value of every rank, in the order of the ranks."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_to_main(self, value: Any) -> list[Any]:
        """Return the picklable host value of every rank on rank 0, and [] on all others."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def wait_for_all(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Wait until every rank has reached this call; `meanwhile` is called every second."""
        if self.control is None:
            return
        arrived = dist.barrier(group=self.control, async_op=True)
        assert arrived is not None
        if meanwhile is not None:
            while not arrived.is_completed():
                meanwhile()
                time.sleep(1)
        arrived.wait()

    def shards_weights(self, cfg: ParallelConfig) -> bool:
        """Return whether weights are sharded, so that no rank holds all of them."""
        return self.group is not None and (self.size if cfg.shard == -1 else cfg.shard) > 1

    def mesh(self, cfg: ParallelConfig) -> DeviceMesh | None:
        """Return the mesh (replicate, shard), or None where every rank holds all weights.

        Raises ValueError where the number of ranks is not a multiple of parallel.shard.
        """
        shard = self.size if cfg.shard == -1 else cfg.shard
        if self.size % shard:
            raise ValueError(
                f"parallel.shard: expected a divisor of the {self.size} ranks, got {cfg.shard}; "
                "set --parallel.shard to one, or to -1 for all ranks"
            )
        if shard == 1:
            return None
        sizes = (self.size // shard, shard)
        mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=("replicate", "shard"))
        for group in mesh.get_all_groups():  # made with torch's own ten minutes
            _set_pg_timeout(PATIENCE, group)
        return mesh


def join_world(device: torch.device, *, seconds: float = 60 * INIT_MINUTES) -> World:
    """Join the world that torchrun's environment variables describe; without them, one process.

    Initialises torch.distributed if that has not been done: NCCL on GPUs, one process a GPU, and
    gloo on CPUs. Once joined, ranks wait for each other for PATIENCE. Raises MissingRanks where a
    rank has not reached this call within `seconds`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        return World(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = join_store(seconds)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            device_id=device if device.type == "cuda" else None,
            timeout=PATIENCE,
        )
    group = dist.group.WORLD
    assert group is not None
    on_gpu = device.type == "cuda"
    control = dist.new_group(backend="gloo", timeout=PATIENCE) if on_gpu else group
    return World(device, dist.get_rank(), dist.get_world_size(), group, control)


def leave_world() -> None:
    """Destroy the process groups of `join_world`, so that no thread of theirs outlives Python.

    A thread of gloo, or of autograd, that drops a tensor while Python ends aborts the process
    (`release_last_backward`). Gloo's threads end with the last object that holds their group, such
    as a model under DDP: the caller drops its model before this. NCCL waits here for all ranks:
    after an error of one, its process ends without this (`end_at_once`).
    """
    release_last_backward()
    gc.collect()  # a model that was dropped may be a cycle
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
    """Return `model` under DDP, FSDP2 or HSDP; its forward is what gradients are reduced for.

    stacks: blocks that run one after another, each gathered by itself where weights are sharded, in
    compute_dtype. What is in no block is gathered in its own dtype, as DDP has it: positions,
    tokens and prototypes are summed and scaled in fp32, and so is the residual stream. A model on
    the meta device is initialised here; `copies` are then the modules that it fills from others.
    FSDP2 does not shard scalars: they stay replicated, and `average_replicated` reduces
    their gradients.
    """
    if world.group is None:
        return model
    mesh = world.mesh(cfg)
    if mesh is None:
        with warnings.catch_warnings():  # torch 2.13 renamed the argument, and 2.10 lacks the name
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            replicated = DistributedDataParallel(
                model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                broadcast_buffers=False,  # statistics are reduced over all ranks already
                gradient_as_bucket_view=True,
            )
        # Every 100th step it would wait for the device, to time it; in the first ten it does.
        replicated._set_ddp_runtime_logging_sample_rate(2**31 - 1)
        return replicated
    if mesh["replicate"].size() == 1:
        mesh = mesh["shard"]
    low = compute_dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,
    )
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
    blocks = [block for stack in stacks for block in stack]
    if is_on_meta(model):
        initialise(model, blocks, world.device, copies=copies, shard=shard)
    else:
        for block in blocks:
            shard(block)
    for stack in stacks:
        prefetch(stack, cfg.prefetch)
    scalars = {p for p in model.parameters() if p.ndim == 0}
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    shard(model, mp_policy=rest, ignored_params=scalars)  # in place
    return model


def prefetch(stack: Sequence[nn.Module], count: int) -> None:
    """Make each block of a stack gather the `count` blocks that follow it, forward and backward."""
    for order, method in (
        (stack, FSDPModule.set_modules_to_forward_prefetch),
        (stack[::-1], FSDPModule.set_modules_to_backward_prefetch),
    ):
        for following, block in enumerate(order, start=1):
            method(block, order[following : following + count])  # type: ignore[arg-type]


def average_replicated(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average the gradients of replicated parameters over the ranks, where other ones are sharded.

    Where nothing is sharded, DDP has averaged them already.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    replicated = [g for g in gradients if not is_sharded(g)]
    if replicated and len(replicated) < len(gradients):
        flat = world.mean(torch.cat([g.reshape(-1) for g in replicated]))
        means = flat.split([g.numel() for g in replicated])
        for gradient, mean in zip(replicated, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


class StopFlag:
    """The signal that any rank has received, which all ranks handle after the same step."""

    def __init__(self, world: World) -> None:
        self.signal: int | None = None
        self._world = world
        self._in_flight: tuple[Tensor, dist.Work] | None = None

    def agreed(self) -> int | None:
        """Return the signal that any rank had at the previous call, and start the next exchange.

        The exchange runs over gloo while the next step trains; no device is waited for.
        """
        group = self._world.control
        if group is None:
            return self.signal
        previous = self.wait()
        value = torch.tensor([self.signal or 0])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=group, async_op=True)
        assert work is not None
        self._in_flight = value, work
        return previous

    def wait(self) -> int | None:
        """Wait for the exchange in flight and return its signal, None if there is none."""
        if self._in_flight is None:
            return None
        value, work = self._in_flight
        work.wait()
        self._in_flight = None
        return int(value) or None
