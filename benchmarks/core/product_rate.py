"""The rate of one large square matrix product, which a step's share of this machine is held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from m3i_fast.engine.precision.cpu_products import by_onednn, fast_cpu_products

SQUARE = 2048
"""Side of the product."""


def square_products(
    device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the product of two SQUARE x SQUARE matrices by each library that a step may use here.

    That of torch as it comes and, where a step on this CPU multiplies by oneDNN instead, that one.
    """
    a, b = (torch.randn(SQUARE, SQUARE, device=device).to(dtype) for _ in range(2))

    def by_default() -> torch.Tensor:
        return torch.mm(a, b)

    def as_a_step_does() -> torch.Tensor:
        with fast_cpu_products(device, dtype):
            return torch.mm(a, b)

    if device.type == "cpu" and by_onednn():
        return {"default": by_default, "oneDNN": as_a_step_does}
    return {"default": by_default}


def rate_gflop_s(milliseconds: Mapping[str, float]) -> float:
    """Return the rate of the faster library in GFLOP/s, from the milliseconds of each product."""
    return 2 * SQUARE**3 / min(milliseconds.values()) / 1e6
