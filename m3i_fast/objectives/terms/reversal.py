"""Gradient reversal: an encoder that is to forget what a head learns to tell from it.

DANN, arXiv 1505.07818.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RISE = 10.0
"""How fast the factor rises, gamma in the paper."""


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return -factor.to(grad.dtype) * grad, None


class Reversal(nn.Module):
    """Pass features on, and their gradient back times -factor.

    The factor rises to `strength` as 2 / (1 + exp(-10 p)) - 1 does from 0 to 1 (arXiv 1505.07818,
    section 5.2.2), p the share of `warmup_steps` that have been taken; without such steps it is
    there from the first one. Steps are counted on the device, by `advance`.
    """

    num_steps: Tensor  # [] int64, taken so far; there is none without a warm-up

    def __init__(self, strength: float, warmup_steps: int) -> None:
        super().__init__()
        self.strength, self.warmup_steps = strength, warmup_steps
        if warmup_steps:
            self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Set the count of steps to 0."""
        if self.warmup_steps:
            self.num_steps.zero_()

    @torch.no_grad()
    def factor(self, like: Tensor) -> Tensor:  # -> [] in fp32, or fp64 for fp64
        """Return the factor of this step, on the device of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        whole = torch.full((), self.strength, dtype=dtype, device=like.device)
        if not self.warmup_steps:
            return whole
        share = (self.num_steps / self.warmup_steps).clamp(max=1).to(dtype)
        return torch.where(share < 1, whole * torch.tanh(RISE / 2 * share), whole)

    def forward(self, features: Tensor) -> Tensor:  # any shape -> the same
        reversed_: Tensor = _Reverse.apply(features, self.factor(features))
        return reversed_

    @torch.no_grad()
    def advance(self) -> None:
        """Count a step, in place; to be called once after each."""
        if self.warmup_steps:
            self.num_steps += 1
