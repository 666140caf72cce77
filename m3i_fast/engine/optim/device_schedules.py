"""Learning rate, weight decay and momentum of a step as tensors, which a captured graph reads."""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim.optimizers import Optimizers


class DeviceSchedules:
    """Holds what the schedules set in a step in the device's memory, written by one copy a step.

    The groups' learning rates become tensors. Optimisers take the weight decay as a number: one
    that changes from step to step is applied here, before them, to the same weights.
    """

    momentum: Tensor
    """[] fp64, of the moving average."""

    def __init__(self, cfg: OptimConfig, optimizer: Optimizers, device: torch.device) -> None:
        self._groups = optimizer.param_groups
        self._values = torch.zeros(len(self._groups) + 2, dtype=torch.float64, device=device)
        self._rates = self._values.float()  # the optimisers' kernels read fp32
        *_, self._weight_decay, self.momentum = self._values.unbind()
        self._decays = cfg.weight_decay != cfg.final_weight_decay
        for group, rate in zip(self._groups, self._rates.unbind(), strict=False):
            group["lr"] = rate
            group["weight_decay"] = cfg.weight_decay * (group["decays"] and not self._decays)
            if "capturable" in group:
                group["capturable"] = True

    @torch.no_grad()
    def write(self, *, lr: float, weight_decay: float, momentum: float) -> None:
        """Write the values of the next step, without a host synchronisation."""
        rates = [lr * group["lr_scale"] for group in self._groups]
        values = torch.tensor([*rates, weight_decay, momentum], dtype=torch.float64)
        if self._values.is_cuda:
            values = values.pin_memory()
        self._values.copy_(values, non_blocking=True)
        self._rates.copy_(self._values)

    @torch.no_grad()
    def decay(self, skip: Tensor) -> None:  # [] fp32
        """Apply a weight decay that changes by step: w <- (1 - lr decay) w, unless skip is 1."""
        if not self._decays:
            return
        for group in self._groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["decays"] and weights:
                factor = 1.0 - group["lr"] * self._weight_decay.float()
                torch._foreach_mul_(weights, torch.where(skip > 0, 1.0, factor))
