"""Initialisation of a sharded model: built on the meta device, then filled and sharded by block.

A block gets memory, is initialised whole and is sharded over the ranks before the next one, so that
a rank holds at most its shards, one block and the modules outside all blocks. Every rank draws all
values in the order of construction, so they equal those of a model that is built in one piece, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from m3i_fast.models.transformer.layers import reset

Shard = Callable[[nn.Module], object]


def is_on_meta(model: nn.Module) -> bool:
    """Return whether any parameter is on the meta device, that is, has no memory yet."""
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def initialise(
    model: nn.Module,
    blocks: Collection[nn.Module],
    device: torch.device,
    *,
    copies: Collection[nn.Module] = (),
    shard: Shard = lambda block: None,
) -> None:
    """Give a model on the meta device memory on `device` and its initial values, in place.

    blocks: modules with `reset_parameters`, each handed to `shard` once it has its values. copies:
    modules that the model's `reset_parameters` fills from others, without drawing.

    Raises RuntimeError naming the tensors that no `reset_parameters` has set.
    """
    names = {id(module): name for name, module in model.named_modules()}
    in_copies = _ids(copies)
    for block in blocks:
        if id(block) in in_copies:
            shard(block)
            block.to_empty(device=device)
        else:
            fill = partial(_fill, block, names[id(block)], device, shard)
            block.reset_parameters = fill  # type: ignore[assignment]
    in_blocks = _ids(blocks)
    outside_blocks = [module for module in model.modules() if id(module) not in in_blocks]
    for module in outside_blocks:
        module.to_empty(device=device, recurse=False)
        _mark_unset(module)
    reset(model)
    _expect_set((names[id(module)], module) for module in outside_blocks)


def _fill(block: nn.Module, name: str, device: torch.device, shard: Shard) -> None:
    """Initialise and shard a block in place of `block.reset_parameters`, at its turn."""
    del block.reset_parameters
    block.to_empty(device=device)
    for module in block.modules():
        _mark_unset(module)
    block.reset_parameters()  # type: ignore[operator]
    _expect_set((f"{name}.{part}".rstrip("."), module) for part, module in block.named_modules())
    shard(block)


def _ids(modules: Collection[nn.Module]) -> set[int]:
    """Return the ids of the modules and of all their submodules."""
    return {id(part) for module in modules for part in module.modules()}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _marker(dtype: torch.dtype) -> float:
    """Return the value that no initialisation sets: NaN, and for integers the lowest."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _mark_unset(module: nn.Module) -> None:
    for _, tensor in _own_tensors(module):
        tensor.fill_(_marker(tensor.dtype))


def _expect_set(named: Iterator[tuple[str, nn.Module]]) -> None:
    unset = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in named
        for name, tensor in _own_tensors(module)
        if _is_marked(tensor)
    ]
    if unset:
        raise RuntimeError(
            f"not initialised: {', '.join(unset)}: expected the reset_parameters of its module, or "
            "of a parent, to set it; set it there, or train with --parallel.shard 1, where the "
            "constructor initialises the model"
        )


def _is_marked(tensor: Tensor) -> bool:
    marker = _marker(tensor.dtype)
    return bool((tensor.isnan() if marker != marker else tensor == marker).any())
