"""Rows of the ledger hold for the recipes that they were made by alone."""

import json
from dataclasses import replace
from typing import Any

import pytest

from m3i_fast.benchmarks.ledger.rows import read_rows
from m3i_fast.benchmarks.methods import plan as methods_plan
from m3i_fast.benchmarks.methods.main import SUBJECT
from m3i_fast.benchmarks.methods.plan import (
    Run,
    follows_recipe,
    recipe_digest,
    recipe_trees,
)
from m3i_fast.benchmarks.methods.variants import VARIANTS
from m3i_fast.config import TrainConfig
from m3i_fast.objectives.methods import METHODS

config_of = methods_plan.config_of

UNMEASURED = {"cappa", "coca", "dinov3", "lejepa", "locca", "radio"}
"""Methods that have no row yet: `m3i-fast bench methods --methods cappa,coca` writes them."""


def test_the_rows_of_the_ledger_are_of_todays_recipes() -> None:
    """Else the methods are measured again, or the reader of configs says what an old one means."""
    rows = {row["figures"]["method"]: row["figures"] for row in read_rows(SUBJECT)}
    assert METHODS.keys() - rows.keys() == UNMEASURED
    assert [name for name in METHODS if name in rows and Run.of(rows[name]) is None] == []


def test_a_field_that_a_row_lacks_is_what_a_config_without_it_means() -> None:
    trees = json.loads(json.dumps(recipe_trees("milan")))
    assert follows_recipe("milan", trees)
    for tree in trees.values():  # fields of their default: of before there were these
        del tree["telemetry"], tree["guard"]["spikes"], tree["keep_every"]
    assert follows_recipe("milan", trees)
    del trees["milan"]["data"]["batch_size"]  # the demo's is not the default
    assert not follows_recipe("milan", trees)


@pytest.mark.parametrize("name", ["milan", "supervised"])
def test_a_row_of_another_recipe_is_none_of_todays(name: str) -> None:
    changed = json.loads(json.dumps(recipe_trees("milan")))
    changed[name]["optim"]["lr"] /= 2
    assert not follows_recipe("milan", changed)
    gone = json.loads(json.dumps(recipe_trees("milan")))
    gone[name]["optim"]["of_yore"] = 1
    assert not follows_recipe("milan", gone)
    less = {other: tree for other, tree in recipe_trees("milan").items() if other != name}
    assert not follows_recipe("milan", less)
    assert not follows_recipe("milan", {})


def test_a_digest_is_of_the_recipe_and_of_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*METHODS, *VARIANTS)
    before = {name: recipe_digest(name) for name in names}
    assert len(set(before.values())) == len(names)

    def changed(method: str, **where: Any) -> TrainConfig:
        cfg = config_of(method, **where)
        slower = replace(cfg, optim=replace(cfg.optim, lr=cfg.optim.lr / 2))
        return slower if method == "supervised" else cfg

    monkeypatch.setattr(methods_plan, "config_of", changed)
    different = {name for name in names if recipe_digest(name) != before[name]}
    taught = {"dense_distillation", "global_distillation", "milan", "radio"}
    assert different == {"supervised", *taught}
