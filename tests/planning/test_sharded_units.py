"""What FSDP2 gathers: counted by hand. That a run gathers so is held by tests/null_cuda."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.costs.gpus import CARDS
from m3i_fast.costs.traffic import Nodes, Unit
from m3i_fast.models.transformer.blocks import Block
from m3i_fast.planning.plan import make_plan
from m3i_fast.planning.sharded_units import GatherCounter, count_scalars, units_of
from m3i_fast.recipes import recipes


class Model(nn.Module):
    """Two blocks, of which one follows by EMA, and weights in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.average = Block(8, 2), Block(8, 2).requires_grad_(False)
        self.head, self.scale = nn.Linear(8, 3), nn.Parameter(torch.tensor(1.0))


def test_a_pass_gathers_before_it_and_before_its_backward_pass() -> None:
    model = Model()
    gathers = GatherCounter(model).gathers
    x = torch.randn(2, 4, 8)
    model.trained(x).sum().backward()
    assert gathers == {"trained": 2}
    with torch.no_grad():
        model.trained(x)
    assert gathers == {"trained": 3}


def test_what_ran_before_is_gathered_in_vain_once() -> None:
    model = Model()
    gathers = GatherCounter(model).gathers
    x = torch.randn(2, 4, 8)
    for _ in range(2):
        model.average(x)
        model.trained(x).sum().backward()
    assert gathers == {"trained": 4, "average": 2 + 1}


@pytest.mark.parametrize("num_shards", [1, 3])
def test_shards_are_padded_to_the_largest(num_shards: int) -> None:
    model = Model()
    of_block = sum(
        -(-len(p) // num_shards) * (p.numel() // len(p)) for p in model.trained.parameters()
    )
    own = 27 // num_shards  # 3 x 8 and 3
    expected = [
        Unit(gathered=of_block, reduced=of_block, gathers=2, weight_bytes=2),
        Unit(gathered=of_block, reduced=0, gathers=1, weight_bytes=2),
        Unit(gathered=own, reduced=own, gathers=1, weight_bytes=4),
    ]
    gathers = {"trained": 2, "average": 1}
    assert units_of(model, gathers, num_shards=num_shards, weight_bytes=2) == expected
    assert count_scalars(model) == 1


def test_a_plan_of_hsdp_lies_between_ddp_and_fsdp() -> None:
    cfg = recipes()["demo"]()
    cfg = replace(
        cfg,
        data=replace(cfg.data, batch_size=4),
        optim=replace(cfg.optim, matrices="adamw"),
        parallel=ParallelConfig(shard=2),
    )
    plan = make_plan(cfg, card=CARDS["h100"], nodes=Nodes(4, 2))
    found = {strategy.name: strategy for strategy in plan.strategies}
    assert list(found) == ["ddp", "fsdp", "hsdp"]
    held = {name: strategy.memory.parts["optimiser states"] for name, strategy in found.items()}
    assert held["fsdp"] == held["hsdp"] / 2 == held["ddp"] / 4
    network = {
        name: strategy.sent["weights and gradients"].network
        for name, strategy in found.items()
        if name != "ddp"
    }
    assert 0 < network["hsdp"] < network["fsdp"]
