"""What FSDP2 gathers and scatters in a step: which weights together, how large, how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from m3i_fast.costs.traffic import Unit
from m3i_fast.engine.build import blocks_of


class GatherCounter:
    """Counter of how often FSDP2 would gather the weights of each block of a model.

    A block is gathered before each forward pass, and before the backward pass through its output.
    What gradient caching runs again is gathered for that backward pass already. Backward, FSDP2
    gathers ahead what ran before: in vain where that was a block that no gradient goes through,
    such as the last one of an average's encoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self.gathers: Counter[str] = Counter()
        self._before = ""  # the block that ran before, where no gradient goes through it
        self._in_vain: set[str] = set()
        names = {id(module): name for name, module in model.named_modules()}
        for block in blocks_of(model):
            block.register_forward_hook(partial(self._count_pass, names[id(block)]))

    def _count_pass(self, name: str, _: nn.Module, inputs: object, result: object) -> None:
        if torch._C._current_graph_task_id() != -1:  # run again in the backward pass
            return
        self._count(name)
        output = [x for x in tree_leaves(result) if isinstance(x, Tensor)][-1]  # of a Residual
        if output.requires_grad:
            output.register_hook(partial(self._count, name))
            if self._before not in self._in_vain:
                self._in_vain.add(self._before)
                self._count(self._before)
        self._before = "" if output.requires_grad else name

    def _count(self, name: str, *_: Tensor) -> None:
        if name:
            self.gathers[name] += 1


def units_of(
    objective: nn.Module, gathers: Mapping[str, int], *, num_shards: int, weight_bytes: int
) -> list[Unit]:
    """Return what FSDP2 gathers together, blocks first; all that is in no block stays gathered.

    weight_bytes: of an element of a block's weights; the rest is in fp32.
    """
    blocks = {id(block) for block in blocks_of(objective)}
    named = [(name, module) for name, module in objective.named_modules() if id(module) in blocks]
    in_blocks = {id(p) for _, block in named for p in block.parameters()}
    units = [
        _unit(block.parameters(), gathers.get(name, 0), num_shards, weight_bytes)
        for name, block in named
    ]
    rest = [p for p in objective.parameters() if id(p) not in in_blocks and p.ndim]
    return [*units, _unit(rest, 1, num_shards, weight_bytes=4)]


def count_scalars(objective: nn.Module) -> int:
    """Return the trained numbers that FSDP2 does not shard, since they have no dimension."""
    return sum(p.requires_grad for p in objective.parameters() if not p.ndim)


def _unit(
    parameters: Iterable[nn.Parameter], gathers: int, num_shards: int, weight_bytes: int
) -> Unit:
    gathered = reduced = 0
    for parameter in parameters:
        rows = len(parameter)
        size = -(-rows // num_shards) * (parameter.numel() // rows)
        gathered += size
        reduced += size * parameter.requires_grad
    return Unit(gathered=gathered, reduced=reduced, gathers=gathers, weight_bytes=weight_bytes)
