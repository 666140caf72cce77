"""What `bench node` times: the loader alone, and steps of the trainer on data from anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.benchmarks.core.timed_windows import TimedWork
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.any_shape.batch import AnyBatch

LOADER, SYNTHETIC, BOTH, NO_EXCHANGE = "loader", "synthetic", "both", "without exchange"
NUM_IN_MEMORY = 2  # batches, so that no step sees the one before it again


class LoaderWork:
    """The loader alone: its batches are not used."""

    def __init__(
        self, loader: Iterator[AnyBatch], *, num_images: int, num_ahead: int, device: torch.device
    ) -> None:
        self.num_images, self._num_ahead = num_images, num_ahead
        self._loader, self._device = loader, device

    def use_up(self) -> None:
        for _ in range(self._num_ahead):
            next(self._loader)

    def step(self) -> None:
        next(self._loader)

    def wait(self) -> None:
        _wait(self._device)

    def read(self) -> dict[str, float]:
        return {}


class TrainWork:
    """The trainer's own steps; schedules start again where they end.

    num_ahead: batches that `data` makes ahead. exchange: whether DDP's ranks reduce gradients;
    without it their weights part.
    """

    def __init__(
        self,
        trainer: Trainer,
        data: Iterator[AnyBatch],
        *,
        num_ahead: int = 0,
        exchange: bool = True,
    ) -> None:
        cfg = trainer.cfg
        self.num_images = cfg.data.batch_size * cfg.parallel.accumulate
        self._trainer, self._data, self._exchange = trainer, data, exchange
        self._num_ahead = num_ahead
        self.loss: float | None = None
        """Of the last window, mean over its steps and all ranks; None where it skipped all."""
        trainer.log.count_from(trainer.step)

    def use_up(self) -> None:
        for _ in range(self._num_ahead):
            next(self._data)

    def step(self) -> None:
        trainer, model = self._trainer, self._trainer.train_step.model
        if trainer.step == trainer.cfg.num_steps:
            trainer.train_step.steps_taken = 0
        if isinstance(model, DistributedDataParallel) and not self._exchange:
            with model.no_sync():
                trainer.next_step(self._data)
        else:
            trainer.next_step(self._data)

    def wait(self) -> None:
        _wait(self._trainer.device)

    def read(self) -> dict[str, float]:
        values = self._trainer.log.read(self._trainer.step)
        self._trainer.guard.drain()  # what it has judged stays on the device until then
        self.loss = values.get("loss/total")
        return {name: value for name, value in values.items() if name.startswith("time/")}


def works_of(trainer: Trainer) -> dict[str, TimedWork]:
    """Return the three loops, and a fourth where DDP's exchange of gradients can be left out."""
    rank, cfg, loader = trainer.world.rank, trainer.cfg, trainer.loader
    num_ahead = cfg.data.prefetch + 1  # and the one that is being made
    batches = itertools.cycle(
        [
            draw_batch(cfg, seed=NUM_IN_MEMORY * rank + index).to(trainer.device)
            for index in range(NUM_IN_MEMORY)
        ]
    )
    works: dict[str, TimedWork] = {
        LOADER: LoaderWork(
            loader, num_images=cfg.data.batch_size, num_ahead=num_ahead, device=trainer.device
        ),
        SYNTHETIC: TrainWork(trainer, batches),
        BOTH: TrainWork(trainer, loader, num_ahead=num_ahead),
    }
    if isinstance(trainer.train_step.model, DistributedDataParallel):
        works[NO_EXCHANGE] = TrainWork(trainer, batches, exchange=False)
    return works


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
