"""The matrix has every recipe of square views, and its cases are configs that can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.counting import config_of, flags_of, plan_of
from m3i_fast.benchmarks.launches.main import Config
from m3i_fast.benchmarks.launches.matrix import CASES, GATED, MATRIX, TEACHER
from m3i_fast.benchmarks.launches.one_case import NUM_STEPS, STEADY, case_config
from m3i_fast.config.optim import IMPLEMENTATIONS
from m3i_fast.planning.step_memory import ENCODER, build_on_meta, count_parameters
from m3i_fast.planning.step_memory import TEACHER as HELD_TEACHER
from m3i_fast.recipes import recipes


def test_every_recipe_of_square_views_is_counted() -> None:
    counted = {case.recipe for case in MATRIX}
    made = {name: make() for name, make in recipes().items()}
    compiled = {name for name, cfg in made.items() if cfg.compile and not cfg.data.any_shape}
    any_shape = {name for name, cfg in made.items() if cfg.data.any_shape}
    # demo_m3i is `demo` itself
    assert recipes().keys() - counted == compiled | any_shape | {"demo_m3i"}
    for name in compiled:
        assert name.rpartition("_")[0] in counted


def test_every_optimiser_is_counted() -> None:
    flags = {word for case in MATRIX for word in case.flags}
    assert {*IMPLEMENTATIONS} <= flags


def test_names_are_of_one_case_each() -> None:
    assert len(CASES) == len(MATRIX)
    assert set(GATED) <= CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_a_config_of_a_few_steps(name: str) -> None:
    case = CASES[name]
    cfg = case_config(case.recipe, [*case.flags])
    assert (cfg.device, cfg.num_steps, cfg.compile) == ("cuda", NUM_STEPS, False)
    assert (STEADY + 1) % cfg.log_every and STEADY + 1 < NUM_STEPS  # it has no monitor


def test_a_teacher_is_trained_where_a_case_needs_one(tmp_path: Path) -> None:
    case = CASES["demo_milan"]
    assert TEACHER in case.flags
    flags = flags_of(case, tmp_path)
    assert flags == ["--objective.teacher", str(tmp_path / "teacher")]
    assert (tmp_path / "teacher" / "config.json").is_file()
    assert flags_of(CASES["demo"], tmp_path) == []
    cfg = config_of(case, tmp_path)
    memory = plan_of(case, cfg).strategies[0].memory
    encoder = count_parameters(build_on_meta(recipes()["demo_supervised"]()))[ENCODER]
    assert memory.parts[HELD_TEACHER] == 4 * encoder


def test_cases_are_chosen_by_their_whole_name() -> None:
    assert [case.name for case in Config(only="demo").cases()] == ["demo"]
    assert len(Config(only="m3i_.*").cases()) == 11
    with pytest.raises(ValueError, match="--only: expected to match one of demo, .*got 'dem'"):
        Config(only="dem").cases()
