"""Ranks that are started to take steps of training, and how long those last.

A process a rank on this machine, over NCCL on GPUs and gloo on a CPU, where each has one thread.
The steps are calls of `TrainStep` on batches that lie on the device: no loader, no log. They are
timed in windows of several, before and after which a rank waits for its device; all ranks begin a
window together, and it lasts as long as the slowest of them. Three kinds of step:

    together    as in training
    unreduced   the same, but DDP sends no gradients (its `no_sync`); not where weights are spread
    alone       as many ranks, busy at once, that are worlds of one: nothing is sent or waited for,
                and a term over the rows of all ranks has those of its own alone

Of one rank the third is the first.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.benchmarks.core.efficiency import efficiency_figures
from m3i_fast.benchmarks.core.random_batch import Repeated, draw_batch
from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.ranks import leave_world
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.telemetry.sampler import TelemetrySampler

Kind = Literal["together", "unreduced", "alone"]
ALL_REDUCE_BYTES = (4096, 2**20, 25 * 2**20)  # the last as DDP's buckets
_NUM_ALL_REDUCES = 5
# What describes another launch than this one.
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The measurement that ranks are started for."""

    config: TrainConfig
    """Its batch is a rank's."""
    num_ranks: int
    cuda: bool
    windows: int
    steps: int
    """Of a window."""
    warmup_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResult:
    """The seconds that one rank measured."""

    step_s: dict[Kind, list[float]]
    """A step's share of each window."""
    stages_ms: dict[str, float]
    """Of a step as it is in training, as metrics are called."""
    all_reduces: list[tuple[int, float]]
    """Bytes and seconds."""
    efficiency: dict[str, Any]
    """Of its card, as it trains together; `core.efficiency`."""
    loss: float
    span_s: tuple[float, float]
    """When the windows began and ended, by the clock of all processes (time.monotonic)."""


def start(job: Job) -> tuple[list[RankResult], dict[str, Any]]:
    """Run the job's ranks: what each found, in their order, and the telemetry of their windows."""
    with TemporaryDirectory() as name, _environment(job), TelemetrySampler() as telemetry:
        folder = Path(name)
        mp.start_processes(_work, (job, folder), nprocs=job.num_ranks, start_method="spawn")
        raw = [json.loads(_result(folder, rank).read_text()) for rank in range(job.num_ranks)]
        begin = min(of_rank["span_s"][0] for of_rank in raw)
        end = max(of_rank["span_s"][1] for of_rank in raw)
        return [_read(of_rank) for of_rank in raw], telemetry.summary(begin, end)


def _read(raw: dict[str, Any]) -> RankResult:
    pairs = [tuple(pair) for pair in raw["all_reduces"]]
    return RankResult(**{**raw, "all_reduces": pairs, "span_s": tuple(raw["span_s"])})


@contextmanager
def _environment(job: Job) -> Iterator[None]:
    """Of the ranks: read when they import torch."""
    changed = {**dict.fromkeys(_OF_LAUNCHERS), **({} if job.cuda else {"OMP_NUM_THREADS": "1"})}
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


# ---- One rank ------------------------------------------------------------------------------------


def _work(rank: int, job: Job, folder: Path) -> None:
    device = torch.device("cuda", rank) if job.cuda else torch.device("cpu")
    if job.cuda:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    data = Repeated(draw_batch(job.config, seed=rank).to(device))
    # Made before the ranks meet, so that its world is one of its own.
    trainer = Trainer(_without_end(job), folder / f"alone{rank}", data=data)
    _meet(rank, job, folder)
    begin = time.monotonic()
    step_s, stages_ms = _windows(trainer, job, ("alone",)), _stages(trainer, job, "alone")
    if job.num_ranks > 1:
        trainer.close()
        del trainer
        gc.collect()
        trainer = Trainer(_without_end(job), folder / "together", data=data)
        begin = time.monotonic()
        step_s |= _windows(trainer, job, _kinds(trainer))
        stages_ms = _stages(trainer, job, "together")
    span_s = begin, time.monotonic()
    result = RankResult(
        step_s=step_s,
        stages_ms=stages_ms,
        all_reduces=_all_reduces(device),
        efficiency=efficiency_figures(trainer, images_s=_images_s(job, step_s)),
        loss=trainer.log.means.read()["loss/total"],
        span_s=span_s,
    )
    _result(folder, rank).write_text(json.dumps(asdict(result)))
    dist.barrier()
    trainer.close()
    del trainer
    leave_world()


def _without_end(job: Job) -> TrainConfig:
    """With schedules for all steps that are taken here."""
    needed = 2 * (job.warmup_steps + job.windows * job.steps) + job.steps
    return replace(job.config, num_steps=max(job.config.num_steps, needed))


def _meet(rank: int, job: Job, folder: Path) -> None:
    dist.init_process_group(
        "nccl" if job.cuda else "gloo",
        store=dist.FileStore(str(folder / "store"), job.num_ranks),
        rank=rank,
        world_size=job.num_ranks,
        device_id=torch.device("cuda", rank) if job.cuda else None,
    )


def _kinds(trainer: Trainer) -> tuple[Kind, ...]:
    is_ddp = isinstance(trainer.train_step.model, DistributedDataParallel)
    return ("together", "unreduced") if is_ddp else ("together",)


def _windows(trainer: Trainer, job: Job, kinds: tuple[Kind, ...]) -> dict[Kind, list[float]]:
    for kind in kinds:
        _window(trainer, kind, job.warmup_steps)
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    gc.collect()
    for index in range(job.windows):
        for kind in kinds[:: -1 if index % 2 else 1]:
            seconds[kind].append(_window(trainer, kind, job.steps))
    return seconds


def _window(trainer: Trainer, kind: Kind, steps: int) -> float:
    """Seconds a step. All begin together, and wait for their device at both ends."""
    silent: AbstractContextManager[None] = nullcontext()
    model = trainer.train_step.model
    if kind == "unreduced" and isinstance(model, DistributedDataParallel):
        silent = model.no_sync()
    _wait(trainer.device)
    dist.barrier()
    begun = time.perf_counter()
    with silent:
        for _ in range(steps):
            trainer.next_step()
    _wait(trainer.device)
    seconds = time.perf_counter() - begun
    trainer.guard.drain()
    return seconds / steps


def _images_s(job: Job, step_s: dict[Kind, list[float]]) -> float:
    """Of this rank, in training."""
    seconds = step_s["together" if job.num_ranks > 1 else "alone"]
    return job.config.data.batch_size / statistics.median(seconds)


def _stages(trainer: Trainer, job: Job, kind: Kind) -> dict[str, float]:
    trainer.log.timer.read()
    _window(trainer, kind, job.steps)
    return trainer.log.timer.read()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- What the machine can do ---------------------------------------------------------------------


def _all_reduces(device: torch.device) -> list[tuple[int, float]]:
    """Bytes and this rank's seconds of each all-reduce in fp32, all ranks beginning together."""
    if dist.get_world_size() == 1:
        return []
    results = []
    for size in ALL_REDUCE_BYTES:
        values = torch.zeros(size // 4, device=device)
        dist.all_reduce(values)  # the first connects
        for _ in range(_NUM_ALL_REDUCES):
            results.append((size, _timed(partial(dist.all_reduce, values), device)))
    return results


def _timed(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    dist.barrier()
    begun = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - begun


def slowest(results: list[RankResult], kind: Kind) -> list[float]:
    """Return the slowest rank's seconds of a step in each window; none if not measured."""
    if kind == "together" and len(results) == 1:
        kind = "alone"
    of_each = [f.step_s.get(kind, []) for f in results]
    return [max(of_ranks) for of_ranks in zip(*of_each, strict=True)]


def all_reduces(results: list[RankResult]) -> dict[int, list[float]]:
    """Return the slowest rank's seconds of each all-reduce, by its bytes."""
    by_size: dict[int, list[float]] = {}
    for of_ranks in zip(*(f.all_reduces for f in results), strict=True):
        size = of_ranks[0][0]
        by_size.setdefault(size, []).append(max(seconds for _, seconds in of_ranks))
    return by_size
