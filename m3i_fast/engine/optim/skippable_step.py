"""Optimiser steps that a flag on the device can skip, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from m3i_fast.engine.parallel.local_shards import is_sharded

# Elements that are stepped together. Temporaries stay in the cache of a CPU, and bounded on a GPU,
# where more together means fewer launches and, of sharded parameters, fewer collectives.
_CHUNK_CPU, _CHUNK = 2**18, 2**26


def step_with_skip(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:  # [] fp32, 1: no step
    """Take a step, or leave weights and state bit for bit as they are.

    torch's fused optimisers take the flag themselves. Any other one is stepped some tensors at a
    time, of which copies are kept until it is known which count: what a step changes must be in
    tensors of `optimizer.state`, on the device. State that this step makes is zeros if skipped.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    groups, skips = optimizer.param_groups, skip > 0
    try:
        for group in groups:
            for params in split_by_size([p for p in group["params"] if p.grad is not None]):
                optimizer.param_groups = [{**group, "params": params}]
                _step_some(optimizer, params, skips)
    finally:
        optimizer.param_groups = groups


@torch.no_grad()
def restore_where(skips: Tensor, tensors: Iterable[Tensor], saved: Iterable[Tensor]) -> None:
    """tensors <- saved where the flag [] bool is set, in place."""
    for tensor, before in zip(tensors, saved, strict=True):
        torch.where(skips, before, tensor, out=tensor)


def split_by_size(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split into lists of bounded size, in order.

    Sizes are of whole tensors, so that the lists of all ranks are of the same ones.
    """
    chunk: list[Tensor] = []
    size = 0
    for p in params:
        limit = _CHUNK_CPU if p.device.type == "cpu" else _CHUNK
        if chunk and size + p.numel() > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(p)
        size += p.numel()
    if chunk:
        yield chunk


def _step_some(optimizer: torch.optim.Optimizer, params: list[Tensor], skips: Tensor) -> None:
    """`params` are all that the optimiser has."""
    saved = {key: tensor.clone() for key, tensor in _changed(optimizer, params)}
    optimizer.step()
    now = dict(_changed(optimizer, params))
    before = [saved[key] if key in saved else torch.zeros_like(now[key]) for key in now]
    restore_where(skips, now.values(), before)


def _changed(
    optimizer: torch.optim.Optimizer, params: list[Tensor]
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """What a step changes, by parameter and name; this rank's parts."""
    for index, p in enumerate(params):
        state: dict[str, Any] = optimizer.state.get(p, {})
        for name, tensor in {"": p, **state}.items():
            yield (index, name), (tensor.to_local() if is_sharded(tensor) else tensor).detach()
