"""Optimiser steps that are skipped by a flag on the device, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from m3i_fast.engine.parallel.local_shards import is_sharded

# Elements that are stepped together. On a CPU the temporaries then stay in its cache; on a GPU a
# larger number means fewer launches and, of sharded parameters, fewer collectives.
_MAX_ELEMENTS_CPU, _MAX_ELEMENTS_GPU = 2**18, 2**26
_STAND_IN: ContextVar[str | None] = ContextVar("stand_in", default=None)


@contextmanager
def steps_as_on(device_type: str) -> Iterator[None]:
    """Step inside as on a device of this type, whatever the tensors' own.

    For a step that is traced on a CPU, to know what it holds on a GPU.
    """
    token = _STAND_IN.set(device_type)
    try:
        yield
    finally:
        _STAND_IN.reset(token)


def device_of(tensor: Tensor) -> torch.device:
    """Return the device that an optimiser steps a tensor as on: its own, or `steps_as_on`'s."""
    stand_in = _STAND_IN.get()
    return tensor.device if stand_in is None else torch.device(stand_in)


def step_with_skip(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:  # [] fp32, 1: no step
    """Take a step where `skip` is 0; where it is 1, keep weights and state bit for bit.

    torch's fused optimisers and Muon take the flag themselves. Any other optimiser is stepped on
    some tensors at a time, and copies of these are put back where the flag is set: all that its
    step writes must be tensors on the device, in its parameters or in `optimizer.state`. State that
    a skipped step creates is set to zeros.
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
    """Write `saved` into `tensors`, in place, where the flag [] bool is set."""
    for tensor, before in zip(tensors, saved, strict=True):
        torch.where(skips, before, tensor, out=tensor)


@torch.no_grad()
def lerp_unless(
    skip: Tensor | None,  # [] fp32
    tensors: list[Tensor],
    ends: list[Tensor],
    weight: float | Tensor,  # [] fp32
) -> None:
    """Move each tensor to its end, tensor <- (1 - weight) tensor + weight end, unless skip is 1.

    skip: None moves them always; this also supports tensors without data.
    """
    if not tensors:
        return
    if skip is None:
        assert not isinstance(weight, Tensor), "weight: expected a number without skip"
        torch._foreach_lerp_(tensors, ends, weight)
    else:  # as a step down |tensor - end|^2 / 2: with decay 1 and the "gradient" end, maximised
        _fused_sgd(skip, tensors, ends, rate=weight, decay=1.0, maximize=True)


@torch.no_grad()
def descend_unless(
    skip: Tensor | None,  # [] fp32
    tensors: list[Tensor],
    directions: list[Tensor],
    rate: float | Tensor,  # [] fp32
    *,
    weight_decay: float,
) -> None:
    """Step tensor <- tensor - rate (direction + weight_decay tensor), in place unless skip is 1.

    skip: None moves them always, by a rate that is a number.
    """
    if skip is not None:
        _fused_sgd(skip, tensors, directions, rate=rate, decay=weight_decay, maximize=False)
        return
    assert not isinstance(rate, Tensor), "rate: expected a number without skip, got a tensor"
    torch._foreach_mul_(tensors, 1 - rate * weight_decay)
    torch._foreach_add_(tensors, directions, alpha=-rate)


def _fused_sgd(
    skip: Tensor,
    tensors: list[Tensor],
    gradients: list[Tensor],
    *,
    rate: float | Tensor,  # [] fp32, read by the kernel where a graph is replayed
    decay: float,
    maximize: bool,
) -> None:
    """Call the one fused kernel of torch, for any tensors, that takes a flag on the device."""
    no_momenta: list[Tensor] = []
    torch._fused_sgd_(
        tensors,
        gradients,
        no_momenta,
        weight_decay=decay,
        momentum=0.0,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=maximize,
        is_first_step=False,
        found_inf=skip,
    )


def split_by_size(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split parameters into lists of bounded size, in order.

    Sizes are those of whole tensors, so that all ranks get lists of the same parameters.
    """
    together: list[Tensor] = []
    size = 0
    for p in params:
        limit = _MAX_ELEMENTS_CPU if device_of(p).type == "cpu" else _MAX_ELEMENTS_GPU
        if together and size + p.numel() > limit:
            yield together
            together, size = [], 0
        together.append(p)
        size += p.numel()
    if together:
        yield together


def _step_some(optimizer: torch.optim.Optimizer, params: list[Tensor], skips: Tensor) -> None:
    """Step an optimiser whose only parameters are `params`; undo it where `skips` is set."""
    saved = {key: tensor.clone() for key, tensor in _written_tensors(optimizer, params)}
    optimizer.step()
    now = dict(_written_tensors(optimizer, params))
    before = [saved[key] if key in saved else torch.zeros_like(now[key]) for key in now]
    restore_where(skips, now.values(), before)


def _written_tensors(
    optimizer: torch.optim.Optimizer, params: list[Tensor]
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Yield the parameters and their state by (index, name), as this rank's local shards."""
    for index, p in enumerate(params):
        state: dict[str, Any] = optimizer.state.get(p, {})
        for name, tensor in {"": p, **state}.items():
            yield (index, name), (tensor.to_local() if is_sharded(tensor) else tensor).detach()
