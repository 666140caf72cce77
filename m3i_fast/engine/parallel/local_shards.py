"""Local shards of tensors that may be sharded over ranks, and the norm of such gradients.

A DTensor is recognised by its method `to_local`: importing its class costs every command half a
second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor, of which this rank holds a local shard."""
    return hasattr(tensor, "to_local")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's local shard of each tensor, or the tensor itself, without a copy."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """The global norm of some gradients, and the norm of each."""

    total: Tensor  # []
    """Norm of all gradients together, the shards of other ranks included."""
    each: Tensor  # [P]
    """Norm of this rank's local shard of each gradient."""


def gradient_norm(gradients: Sequence[Tensor]) -> GradientNorm:
    """Return the norms of gradients, one or more, without a host synchronisation."""
    norms = torch._foreach_norm(local(gradients))
    each = torch.stack(norms)
    sharded = [norm for norm, g in zip(norms, gradients, strict=True) if is_sharded(g)]
    if not sharded:
        return GradientNorm(torch.linalg.vector_norm(each), each)
    square = torch.stack(sharded).square().sum()
    mesh = next(g for g in gradients if is_sharded(g)).device_mesh  # type: ignore[attr-defined]
    # Over the shard dimension alone: along the other one the ranks hold replicas.
    dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))
    replicated = [norm for norm, g in zip(norms, gradients, strict=True) if not is_sharded(g)]
    if replicated:
        square = square + torch.stack(replicated).square().sum()
    return GradientNorm(square.sqrt(), each)
