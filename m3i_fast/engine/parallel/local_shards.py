"""This rank's parts of tensors that may be spread over ranks.

A DTensor is told by its method: to import its class costs every command half a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether other ranks hold parts of it."""
    return hasattr(tensor, "to_local")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each, of the same memory."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class GradientNorm:
    total: Tensor  # []
    """Of all gradients together, the parts of other ranks included."""
    each: Tensor  # [P]
    """Of this rank's part of each."""


def gradient_norm(gradients: Sequence[Tensor]) -> GradientNorm:
    """Compute the norm of gradients, one or more, without a host synchronisation."""
    norms = torch._foreach_norm(local(gradients))
    each = torch.stack(norms)
    spread = [norm for norm, g in zip(norms, gradients, strict=True) if is_sharded(g)]
    if not spread:
        return GradientNorm(torch.linalg.vector_norm(each), each)
    square = torch.stack(spread).square().sum()
    mesh = next(g for g in gradients if is_sharded(g)).device_mesh  # type: ignore[attr-defined]
    dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # others hold replicas
    whole = [norm for norm, g in zip(norms, gradients, strict=True) if not is_sharded(g)]
    if whole:
        square = square + torch.stack(whole).square().sum()
    return GradientNorm(square.sqrt(), each)
