"""Exponential moving average of the encoder: the target network."""

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
    """average <- momentum * average + (1 - momentum) * online, in place; as it was if skip is 1.

    Over all parameters; buffers are copied. Where weights are spread over ranks, each rank averages
    what it holds: both are spread alike.
    """
    averages, onlines = local(average.parameters()), local(online.parameters())
    if skip is None:  # also of tensors without data, for which the fused kernel has no form
        torch._foreach_lerp_(averages, onlines, 1.0 - momentum)
    else:
        _descend(averages, onlines, 1.0 - momentum, skip)
    for target, source in zip(average.buffers(), online.buffers(), strict=True):
        if skip is None:
            target.copy_(source)
        else:
            torch.where(skip > 0, target, source, out=target)


def _descend(averages: list[Tensor], onlines: list[Tensor], rate: float, skip: Tensor) -> None:
    """A step of SGD down |average - online|^2 / 2, which is the average.

    The one fused kernel for it that takes a flag of the device: with weight decay 1, up the
    "gradient" online.
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
