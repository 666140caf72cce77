"""Exponential moving average (EMA) of the encoder, which is the target network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_fast.engine.optim.skippable_step import lerp_unless
from m3i_fast.engine.parallel.local_shards import local


@torch.no_grad()
def update_ema(
    average: nn.Module,
    online: nn.Module,
    momentum: float | Tensor,  # [] fp64
    skip: Tensor | None = None,  # [] fp32
) -> None:
    """Update average <- momentum * average + (1 - momentum) * online, in place, unless skip is 1.

    Parameters are averaged and buffers are copied. Of sharded parameters each rank averages its
    local shard: both modules are sharded alike.
    """
    averages, onlines = local(average.parameters()), local(online.parameters())
    weight = 1.0 - momentum
    lerp_unless(skip, averages, onlines, weight.float() if isinstance(weight, Tensor) else weight)
    for target, source in zip(average.buffers(), online.buffers(), strict=True):
        if skip is None:
            target.copy_(source)
        else:
            torch.where(skip > 0, target, source, out=target)
