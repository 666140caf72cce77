"""A node whose loader, model, exchange and clock are as slow as a test says; nothing sleeps."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.benchmarks.core.timed_windows import Schedule, Series, measure_windows
from m3i_fast.benchmarks.node.bottleneck import Findings
from m3i_fast.benchmarks.node.figures import find, summarise_ranks
from m3i_fast.benchmarks.node.workloads import (
    BOTH,
    LOADER,
    NO_EXCHANGE,
    SYNTHETIC,
    LoaderWork,
    TrainWork,
)

BATCH = 32
FULL_MHZ = 1980.0
SCHEDULE = Schedule(num_windows=5, window_s=2.0, warmup_steps=4)


@dataclass
class Node:
    """Seconds of a batch; noise of one percent. Its clock goes on as its parts take time."""

    load_s: float = 0.05
    """A batch is made in the background, two at most ahead."""
    model_s: float = 0.05
    exchange_s: float = 0.0
    slow_from_s: float = float("inf")
    """From then on the card's clock is two thirds of the full one."""
    slow_until_s: float = float("inf")
    first_steps: int = 3
    """Which take ten times as long, as those that compile."""
    now: float = 100.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * self.random.uniform(0.99, 1.01)

    @property
    def is_slow(self) -> bool:
        return self.slow_from_s <= self.now < self.slow_until_s

    def summary(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """As Telemetry's."""
        slow = begin_s < self.slow_until_s and end_s > self.slow_from_s
        mhz = FULL_MHZ * 2 / 3 if slow else FULL_MHZ
        gpu = {
            "sm_clock_mhz": {"mean": mhz, "max": mhz},
            "throttle_reasons": ["sw_thermal_slowdown"] if slow else [],
        }
        return {"gpus": [gpu], "throttled": slow, "energy_j": 300.0 * (end_s - begin_s)}


class Loader:
    """Made in the background: a batch waits if it is ready, else for it is waited."""

    def __init__(self, node: Node, depth: int = 2) -> None:
        self._node, self._free = node, node.now
        self._ready: deque[float] = deque()
        for _ in range(depth):
            self._begin()

    def _begin(self) -> None:
        self._free = max(self._free, self._node.now) + self._node.load_s
        self._ready.append(self._free)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> None:
        self._node.now = max(self._node.now, self._ready.popleft())
        self._begin()


class Memory:
    def __iter__(self) -> Memory:
        return self

    def __next__(self) -> None:
        """At once."""


class Ranks(DistributedDataParallel):
    """The flag that `no_sync` sets, alone."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.require_backward_grad_sync = True


class Trainer:
    """What TrainWork asks of one."""

    def __init__(self, node: Node) -> None:
        data = SimpleNamespace(batch_size=BATCH)
        parallel = SimpleNamespace(accumulate=1)
        self.cfg = SimpleNamespace(data=data, parallel=parallel, num_steps=50)
        self.device = torch.device("cpu")
        self.train_step = SimpleNamespace(model=Ranks(), steps_taken=0)
        self.log = SimpleNamespace(count_from=lambda step: None, read=self._read)
        self.guard = SimpleNamespace(drain=lambda: None)
        self._node, self._waited, self._steps, self._all = node, 0.0, 0, 0

    @property
    def step(self) -> int:
        return int(self.train_step.steps_taken)

    def next_step(self, data: Any) -> None:
        node, begun = self._node, self._node.now
        assert self.step < self.cfg.num_steps
        next(data)
        self._waited += node.now - begun
        factor = 10 if self._all < node.first_steps else 1
        node.spend(node.model_s * factor * (1.5 if node.is_slow else 1.0))
        if self.train_step.model.require_backward_grad_sync:
            node.spend(node.exchange_s)
        self.train_step.steps_taken += 1
        self._steps, self._all = self._steps + 1, self._all + 1

    def _read(self, step: int) -> dict[str, float]:
        waited = 1e3 * self._waited / max(self._steps, 1)
        self._waited, self._steps = 0.0, 0
        return {"time/data.wait_ms": waited, "loss/total": 1.0}


def run(node: Node, schedule: Schedule = SCHEDULE) -> dict[str, Series]:
    """The benchmark's own loop and works on the node."""
    trainer, loader = Trainer(node), Loader(node)
    works = {
        LOADER: LoaderWork(
            loader,  # type: ignore[arg-type]
            num_images=BATCH,
            num_ahead=3,
            device=trainer.device,
        ),
        SYNTHETIC: TrainWork(trainer, Memory()),  # type: ignore[arg-type]
        BOTH: TrainWork(trainer, loader, num_ahead=3),  # type: ignore[arg-type]
        NO_EXCHANGE: TrainWork(trainer, Memory(), exchange=False),  # type: ignore[arg-type]
    }
    return measure_windows(works, schedule, clock=node, telemetry=node.summary)


def found_of(series: dict[str, Series], num_ranks: int = 2) -> Findings:
    ranks = [series] * num_ranks
    return find(ranks, {n: summarise_ranks([own[n] for own in ranks]) for n in series})
