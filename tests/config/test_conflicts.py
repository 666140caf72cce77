"""All that is wrong with a config is said at once, each with the path of its field."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pytest

from m3i_fast.config import OptimConfig, ParallelConfig, TrainConfig, ViTConfig
from m3i_fast.config.fields import Checked, Conflict, all_conflicts, check_fields, deferred_checks
from m3i_fast.config.optim import IMPLEMENTATIONS
from m3i_fast.engine.optim.optimizers import _BUILDERS
from m3i_fast.recipes import demo, recipes


def test_a_config_names_all_that_is_wrong_with_itself() -> None:
    with pytest.raises(ValueError) as refused:
        OptimConfig(lr=0.0, warmup_fraction=2.0, name="lars", impl="te")
    assert str(refused.value).split("; ") == [
        "optim.lr: expected > 0, got 0.0",
        "optim.warmup_fraction: expected 0 to 1, got 2.0",
        "optim.impl: expected auto or torch with optim.name = lars, got te",
    ]


def test_numbers_come_before_what_is_computed_of_them() -> None:
    with pytest.raises(ValueError) as refused:  # dim % num_heads would divide by zero
        ViTConfig(num_heads=0, drop_path_rate=2.0)
    assert str(refused.value) == "num_heads: expected 1 to 65536, got 0"


def test_a_tree_names_all_that_is_wrong_in_it_by_path() -> None:
    cfg = demo()
    with deferred_checks():
        wrong = replace(
            cfg,
            vision=replace(cfg.vision, dim=130),
            optim=replace(cfg.optim, lr=-1.0),
            parallel=ParallelConfig(shard=2),
        )
    assert [path for path, _ in all_conflicts(wrong)] == [
        "vision.dim",  # of the heads
        "vision.dim",  # of the sine-cosine
        "optim.lr",
        "optim.matrices",  # muon and shards
    ]
    with deferred_checks():
        wrong = replace(wrong, vision=replace(cfg.vision, num_heads=0))
    assert [path for path, _ in all_conflicts(wrong)] == ["vision.num_heads", "optim.lr"]


def test_checks_are_back_after_they_were_deferred() -> None:
    with deferred_checks():
        assert ParallelConfig(shard=0).shard == 0
    with pytest.raises(ValueError, match=r"parallel\.shard"):
        ParallelConfig(shard=0)
    with pytest.raises(RuntimeError), deferred_checks():
        raise RuntimeError
    with pytest.raises(ValueError, match=r"parallel\.shard"):
        ParallelConfig(shard=0)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_has_no_conflict(name: str) -> None:
    assert all_conflicts(recipes()[name]()) == []


def test_a_file_names_all_that_is_wrong_in_it(tmp_path: Path) -> None:
    tree = json.loads(demo().to_json())
    tree["optim"]["lr"], tree["data"]["local_views"]["scale"] = 0.0, [0.5, 7.0]
    tree["parallel"]["shard"] = 2
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError) as refused:
        TrainConfig.load(path)
    found = str(refused.value).removeprefix(f"{path}: ").split("; ")
    assert [line.partition(":")[0] for line in found if "expected" in line] == [
        "data.local_views.scale",
        "optim.lr",
        "optim.matrices",
    ]


@dataclass(frozen=True)
class Pair(Checked):
    """Two numbers, of which the first is not above the second."""

    low: Annotated[int, range(10)]
    high: Annotated[int, range(10)]

    def conflicts(self) -> list[Conflict]:
        return [] if self.low <= self.high else [("low", f"expected <= {self.high}")]


def test_the_base_of_configs_checks_ranges_and_then_conflicts() -> None:
    assert Pair(1, 2).high == 2
    with pytest.raises(ValueError, match=r"^low: expected <= 1$"):
        Pair(2, 1)
    with pytest.raises(ValueError, match=r"^low: expected 0 to 9, got 12; high: .* got -1$"):
        Pair(12, -1)
    with deferred_checks():
        pair = Pair(12, 3)
    with pytest.raises(ValueError, match=r"^pair\.low: expected 0 to 9, got 12$"):
        check_fields(pair, "pair.")


def test_every_implementation_of_an_optimiser_has_a_builder() -> None:
    assert {(name, impl) for name, impls in IMPLEMENTATIONS.items() for impl in impls} == set(
        _BUILDERS
    )
