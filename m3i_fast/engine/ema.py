"""Exponential moving average of the encoder: the target network."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from m3i_fast.engine.parts import local
from m3i_fast.engine.schedules import cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class EmaConfig:
    momentum: float = 0.995
    """Momentum at the first step (SiameseIM: 0.995)."""
    final_momentum: float = 1.0
    """Momentum at the last step, reached by a cosine."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= self.final_momentum <= 1:
            raise ValueError(
                f"ema.momentum: expected 0 <= momentum <= final_momentum <= 1, got "
                f"{self.momentum} and "
                f"{self.final_momentum}"
            )

    def schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        return cosine(self.momentum, self.final_momentum, num_steps=num_steps)


@torch.no_grad()
def update_ema(average: nn.Module, online: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * online, in place.

    Over all parameters; buffers are copied. Where weights are spread over ranks, each rank averages
    what it holds: both are spread alike.
    """
    torch._foreach_lerp_(local(average.parameters()), local(online.parameters()), 1.0 - momentum)
    for target, source in zip(average.buffers(), online.buffers(), strict=True):
        target.copy_(source)
