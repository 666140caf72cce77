"""The arms of --pilot and --targets take as many steps as their committed times say, anywhere."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.methods import main as methods
from m3i_fast.benchmarks.methods import step_times as methods_pace
from m3i_fast.benchmarks.methods.main import main
from m3i_fast.benchmarks.methods.plan import (
    PACED,
    PILOT,
    TARGETS,
    Config,
    Plan,
    follows_recipe,
)
from m3i_fast.benchmarks.methods.step_times import read_step_times, step_counts, write_step_times
from m3i_fast.config import TrainConfig

COMMITTED = methods_pace.FOLDER
ARMS: dict[Plan, tuple[str, ...]] = {"pilot": PILOT, "targets": TARGETS}


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pilot's file of step times, which is not there yet."""
    monkeypatch.setattr(methods_pace, "FOLDER", tmp_path)
    return methods_pace.step_times_file("pilot")


def _write(**rounds: list[float]) -> None:
    write_step_times("pilot", rounds, num_threads=1, jobs=2, dataset="openmoji")


def test_steps_follow_from_the_medians(file: Path) -> None:
    _write(supervised=[0.25, 9.0, 0.2], clip=[0.1, 0.3, 0.3])
    assert step_counts("pilot", ["supervised", "clip"], 90) == {"supervised": 360, "clip": 300}
    assert step_counts("pilot", ["clip"], 0.1) == {"clip": 1}
    told = json.loads(file.read_text())
    assert told["figures"]["arms"]["supervised"]["rounds_ms"] == [250.0, 9000.0, 200.0]
    assert told["figures"]["load"] >= 0 and told["machine"]["cpu"] and told["command"]


def test_times_of_another_recipe_are_refused(file: Path) -> None:
    with pytest.raises(
        ValueError, match="of clip with today's recipe, got none; .* --pilot --calibrate"
    ):
        step_counts("pilot", ["clip"], 90)
    _write(clip=[0.1, 0.1, 0.1])
    told = json.loads(file.read_text())
    told["figures"]["arms"]["clip"]["recipes"]["clip"]["optim"]["lr"] /= 2
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="of clip with today's recipe, got that of another"):
        step_counts("pilot", ["clip"], 90)
    file.write_text(file.read_text().replace("step_ms", "step_us"))
    with pytest.raises(ValueError, match="step_times_pilot.json: damaged: .*step_ms"):
        read_step_times("pilot")


@pytest.mark.parametrize("plan", PACED)
def test_committed_times_are_of_todays_recipes(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `m3i-fast bench methods --pilot --calibrate` is to be typed again."""
    monkeypatch.setattr(methods_pace, "FOLDER", COMMITTED)
    times = read_step_times(plan)
    assert times.keys() == set(ARMS[plan])
    assert [name for name in ARMS[plan] if not follows_recipe(name, times[name].recipes)] == []


def test_each_arm_of_the_pilot_has_its_own_number_of_steps(tmp_path: Path) -> None:
    _write(**{name: [0.1 + 0.1 * index] * 3 for index, name in enumerate(PILOT)})
    cfg = Config(pilot=True, seeds="0,1,2", seconds=60, data=tmp_path, ledger=tmp_path, jobs=1)
    planned = list(methods._planned(cfg))
    steps = {run.method: run.num_steps for run in planned}
    assert steps == {
        "untrained": 0,
        **{name: round(600 / (1 + index)) for index, name in enumerate(PILOT)},
    }
    shares = {run.method: (run.labelled, run.captioned) for run in planned}
    assert shares == {
        **dict.fromkeys(PILOT, (0.03, 0.3)),
        **dict.fromkeys(("siameseim", "untrained"), (1.0, 1.0)),
    }
    assert len(planned) == len({run.name for run in planned}) == 3 * 7
    alike = replace(cfg, num_steps=7)
    assert {run.num_steps for run in methods._planned(alike)} == {0, 7}


def test_calibrating_times_all_arms_in_turn_and_writes_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    ticks: Iterator[int] = count()

    def step_seconds(cfg: TrainConfig) -> float:
        asked.append(tuple(term.name for term in cfg.objective.active_terms))
        assert cfg.num_threads >= 1
        return float(10 + next(ticks))

    packed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(methods, "step_seconds", step_seconds)
    monkeypatch.setattr(methods, "_pack", lambda _, *shares: packed.append(shares))
    monkeypatch.setattr(methods, "child_processes", ThreadPoolExecutor)
    main(["--pilot", "--calibrate", "--jobs", "1", "--data", str(tmp_path)])
    assert packed == [(1.0, 1.0), (0.03, 0.3)]
    assert asked == asked[: len(PILOT)] * methods_pace.ROUNDS
    # The median of three rounds is the middle one's, which comes after all arms' first.
    times = {name: 10.0 + len(PILOT) + index for index, name in enumerate(PILOT)}
    assert {name: t.step_ms for name, t in read_step_times("pilot").items()} == {
        name: 1000 * seconds for name, seconds in times.items()
    }
    assert json.loads(file.read_text())["figures"]["jobs"] == 1
