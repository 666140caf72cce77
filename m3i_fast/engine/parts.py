"""This rank's parts of tensors that may be spread over ranks.

A DTensor is told by its method: to import its class costs every command half a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether other ranks hold parts of it."""
    return hasattr(tensor, "to_local")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of each, of the same memory."""
    return [t.to_local() if is_spread(t) else t for t in tensors]  # type: ignore[attr-defined]


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:  # []
    """Of all of them together, the parts of other ranks included."""
    whole = [g for g in gradients if not is_spread(g)]
    spread = [g for g in gradients if is_spread(g)]
    norms = [torch.nn.utils.get_total_norm(whole, foreach=True)] if whole or not spread else []
    if spread:
        square = torch.nn.utils.get_total_norm(local(spread), foreach=True).square()
        mesh = spread[0].device_mesh  # type: ignore[attr-defined]
        dist.all_reduce(square, group=mesh.get_group(mesh.ndim - 1))  # others hold replicas
        norms.append(square.sqrt())
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
