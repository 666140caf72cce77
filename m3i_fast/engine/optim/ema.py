"""Exponential moving average (EMA) of the encoder, which is the target network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m3i_fast.engine.parallel.local_shards import local


@torch.no_grad()
def update_ema(
    average: nn.Module,
    online: nn.Module,
    momentum: float,
    skip: Tensor | None = None,  # [] fp32
) -> None:
    """Update average <- momentum * average + (1 - momentum) * online, in place, unless skip is 1.

    Parameters are averaged and buffers are copied. Of sharded parameters each rank averages its
    local shard: both modules are sharded alike.
    """
    averages, onlines = local(average.parameters()), local(online.parameters())
    if skip is None:  # also supports tensors without data, which the fused kernel does not
        torch._foreach_lerp_(averages, onlines, 1.0 - momentum)
    else:
        _descend(averages, onlines, 1.0 - momentum, skip)
    for target, source in zip(average.buffers(), online.buffers(), strict=True):
        if skip is None:
            target.copy_(source)
        else:
            torch.where(skip > 0, target, source, out=target)


def _descend(averages: list[Tensor], onlines: list[Tensor], rate: float, skip: Tensor) -> None:
    """Take the average as a step of SGD down |average - online|^2 / 2.

    `torch._fused_sgd_` is the one fused kernel that takes a skip flag on the device. With weight
    decay 1 and the "gradient" `online`, maximised, its step is the average.
    """
    torch._fused_sgd_(
        averages,
        onlines,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=skip,
    )
