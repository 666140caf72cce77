"""Functions in the place of one trainer's step, which its other parts stay those of."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from m3i_fast.engine.train_step import TrainStep
from m3i_fast.engine.trainer import Trainer

Call = Callable[..., dict[str, Tensor]]


def replace_call(trainer: Trainer, call: Call) -> None:
    """Have a call of this trainer's step be one of `call`, with the same arguments.

    `trainer.train_step.__call__`, read before, is the call that was replaced.
    """

    def replaced(_: TrainStep, *arguments: object, **options: object) -> dict[str, Tensor]:
        return call(*arguments, **options)

    kind = type(trainer.train_step)
    trainer.train_step.__class__ = type(kind.__name__, (kind,), {"__call__": replaced})
