"""Models made where they are spread: without memory at first, then block by block.

A block is given memory, drawn whole and shared out among the ranks before the next one is, so that
a rank holds its parts, one block and what is in none at most. Everything is drawn in the order of
construction by every rank, so the values are those of a model that is made in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from m3i_fast.models.transformer.blocks import reset

Share = Callable[[nn.Module], object]


def is_on_meta(model: nn.Module) -> bool:
    """Whether it has no memory yet."""
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def initialise(
    model: nn.Module,
    blocks: Collection[nn.Module],
    device: torch.device,
    *,
    copies: Collection[nn.Module] = (),
    share: Share = lambda block: None,
) -> None:
    """Memory on `device` and first values for a model on the meta device, in place.

    blocks: modules with `reset_parameters`, each handed to `share` once it has its values. copies:
    modules that the model's `reset_parameters` fills from others, without drawing.

    Raises RuntimeError that names what no `reset_parameters` has set.
    """
    names = {id(module): name for name, module in model.named_modules()}
    in_copies = _ids(copies)
    for block in blocks:
        if id(block) in in_copies:
            share(block)
            block.to_empty(device=device)
        else:
            fill = partial(_fill, block, names[id(block)], device, share)
            block.reset_parameters = fill  # type: ignore[assignment]
    in_blocks = _ids(blocks)
    rest = [module for module in model.modules() if id(module) not in in_blocks]
    for module in rest:
        module.to_empty(device=device, recurse=False)
        _unset(module)
    reset(model)
    _expect_set((names[id(module)], module) for module in rest)


def _fill(block: nn.Module, name: str, device: torch.device, share: Share) -> None:
    """What stands for `block.reset_parameters` in its turn."""
    del block.reset_parameters
    block.to_empty(device=device)
    for module in block.modules():
        _unset(module)
    block.reset_parameters()  # type: ignore[operator]
    _expect_set((f"{name}.{part}".rstrip("."), module) for part, module in block.named_modules())
    share(block)


def _ids(modules: Collection[nn.Module]) -> set[int]:
    """Of the modules and all that is in them."""
    return {id(part) for module in modules for part in module.modules()}


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _marker(dtype: torch.dtype) -> float:
    """What no initialisation sets: NaN, of integers the lowest."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _unset(module: nn.Module) -> None:
    for _, tensor in _own(module):
        tensor.fill_(_marker(tensor.dtype))


def _expect_set(named: Iterator[tuple[str, nn.Module]]) -> None:
    found = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in named
        for name, tensor in _own(module)
        if _is_marked(tensor)
    ]
    if found:
        raise RuntimeError(
            f"not initialised: {', '.join(found)}: expected the reset_parameters of its module, or "
            "of a parent, to set it; with parallel.shard = 1 the constructor alone does"
        )


def _is_marked(tensor: Tensor) -> bool:
    marker = _marker(tensor.dtype)
    return bool((tensor.isnan() if marker != marker else tensor == marker).any())
