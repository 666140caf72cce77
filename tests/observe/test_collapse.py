"""When the watch speaks: after the warm-up, of a metric that stays out of its range, once.

Recorded runs (`runs/`): the demo with labels and captions for 1 %, 300 steps, every 20th of them.
`starved` is M3I as it was, `repaired` M3I with expectations over samples, all inputs and cells at
weight 1 and standardised targets, `siameseim` the method as its authors have it.
"""

import json
import math
from pathlib import Path

import pytest

from m3i_fast.observe.collapse import (
    HEALTHY_RANGES,
    HINT_ROWS,
    HINT_STEPS,
    PATIENCE,
    CollapseWatch,
    healthy_range,
)
from m3i_fast.observe.metrics import read_jsonl

RUNS = Path(__file__).parent / "runs"

BAD, GOOD = {"monitor/target_rank": 1.0}, {"monitor/target_rank": 20.0}


def _spoken(rows: list[dict[str, float]], first_step: int = 0) -> list[tuple[int, str]]:
    watch = CollapseWatch(first_step=first_step)
    return [
        (step, collapse.name)
        for step, row in enumerate(rows, start=1)
        for collapse in watch.new_collapses(step, row)
    ]


def test_it_takes_patience_and_is_said_once() -> None:
    assert _spoken([BAD] * (PATIENCE - 1)) == []
    assert _spoken([BAD] * 10) == [(PATIENCE, "monitor/target_rank")]
    assert _spoken([BAD] * 10 + [GOOD] + [BAD] * 10) == [(PATIENCE, "monitor/target_rank")]
    assert _spoken(([BAD] * (PATIENCE - 1) + [GOOD]) * 5) == []
    assert _spoken([BAD] * 10, first_step=4) == [(4 + PATIENCE, "monitor/target_rank")]


def test_metrics_are_counted_apart_and_losses_not_at_all() -> None:
    row = BAD | {"monitor/intra_cosine": 1.0, "loss/total": 1e9, "optim/lr": math.nan}
    names = {name for _, name in _spoken([row] * 5)}
    assert names == {"monitor/target_rank", "monitor/intra_cosine"}


def test_what_is_not_a_number_is_out_of_range() -> None:
    assert len(_spoken([{"monitor/target_std": math.nan}] * 5)) == 1


def test_the_warning_names_metric_value_range_cause_and_setting() -> None:
    watch = CollapseWatch(first_step=0)
    found = [
        c
        for step in (5, 10, 15)
        for c in watch.new_collapses(step, {"monitor/b_log_scale": 2500.0})
    ]
    text = str(found[0])
    for part in ("step 15", "monitor/b_log_scale = 2500", "0.999 to 100.1", "saturated"):
        assert part in text
    assert "objective.temperature" in text


Rows = list[dict[str, float]]


def _hinted(rows: Rows, first_step: int = 0, every: int = 20) -> list[tuple[int, str]]:
    watch = CollapseWatch(first_step=first_step)
    steps = range(every, every * len(rows) + 1, every)
    return [
        (step, hint.name)
        for step, row in zip(steps, rows, strict=True)
        for hint in watch.new_hints(step, row)
    ]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ("starved", {"monitor/intra_explained", "monitor/inter_explained"}),
        ("repaired", set()),
        ("siameseim", set()),
    ],
)
def test_the_starved_run_is_hinted_at_and_the_others_are_not(run: str, expected: set[str]) -> None:
    rows = read_jsonl(RUNS / f"{run}.jsonl")
    assert len(rows) == 15
    assert {name for _, name in _hinted(rows, first_step=12)} == expected
    assert _spoken(rows) == []  # it does not collapse, and its cosines are high
    assert _hinted(rows[:5]) == []  # a hundred steps are too few to tell


POOR = {"monitor/intra_constant": 0.9, "monitor/intra_explained": -2.0, "gradient_cosine/a_b": -0.5}


def test_a_hint_takes_rows_and_steps_and_is_given_once() -> None:
    assert _hinted([POOR] * (HINT_ROWS - 1), every=1000) == []
    assert _hinted([POOR] * HINT_STEPS, every=1) == []
    once = [(1000 * HINT_ROWS, name) for name in POOR]
    assert _hinted([POOR] * 100, every=1000) == once
    assert _hinted([POOR] * (HINT_STEPS + 5), every=1) == [(HINT_STEPS + 1, name) for name in POOR]
    assert _hinted([POOR] * (HINT_ROWS + 4), first_step=5000, every=1000) == []
    assert _spoken([POOR] * 100) == []  # and never a collapse


def test_a_hint_is_about_the_mean() -> None:
    good = {"monitor/intra_explained": 0.5}
    one_in_five = ([good] * 4 + [{"monitor/intra_explained": -1.0}]) * 20
    assert _hinted(one_in_five) == []
    names = {name for _, name in _hinted([good] * 30 + [{"monitor/intra_explained": -1.0}] * 30)}
    assert names == {"monitor/intra_explained"}


@pytest.mark.parametrize(("pull", "is_starved"), [(0.02, True), (0.4, False)])
def test_a_term_is_starved_beside_one_that_few_pictures_have(pull: float, is_starved: bool) -> None:
    """A label that one step in five has, of pull 17, is 3.4 in the mean."""
    rows = [{"gradient/dense": pull, "gradient/label": 17.0 * (i % 5 == 0)} for i in range(60)]
    assert [name for _, name in _hinted(rows)] == ["gradient_share/dense"] * is_starved
    assert _hinted([{"gradient/alone": 0.0}] * 60) == []


def test_a_watch_that_goes_on_says_what_the_whole_one_does() -> None:
    rows = read_jsonl(RUNS / "starved.jsonl")
    whole = CollapseWatch(first_step=12)
    expected = [h for row in rows for h in whole.new_hints(int(row["step"]), row)]
    parts, found = CollapseWatch(first_step=12), []
    for row in rows:
        found += parts.new_hints(int(row["step"]), row)
        state = json.loads(json.dumps(parts.state_dict()))
        parts = CollapseWatch(first_step=12)
        parts.load_state_dict(state)
    assert found == expected and parts.state_dict() == whole.state_dict()
    old = CollapseWatch(first_step=0)
    old.load_state_dict({"monitor/target_rank": 2})  # of a checkpoint without hints
    assert [c.name for c in old.new_collapses(1, BAD)] == ["monitor/target_rank"]


def test_a_hint_says_what_to_change() -> None:
    watch = CollapseWatch(first_step=0)
    row = POOR | {"gradient/dense": 1e-3, "gradient/label": 1.0}
    found = {h.name: str(h) for step in range(20, 300, 20) for h in watch.new_hints(step, row)}
    for part in ("step 200", "= 0.9 in the mean", "at most 0.7", "one vector", "standardise"):
        assert part in found["monitor/intra_constant"]
    assert "objective.balance.mode gradient_norm" in found["gradient_share/dense"]
    assert "pull the encoder apart" in found["gradient_cosine/a_b"]


@pytest.mark.parametrize("entry", HEALTHY_RANGES, ids=lambda entry: entry.pattern)
def test_every_range_is_found_by_name_and_has_a_bound(entry) -> None:  # type: ignore[no-untyped-def]
    name = entry.pattern.replace("*", "caption")
    assert healthy_range(name) is entry
    bounds = [bound for bound in (entry.low, entry.high) if math.isfinite(bound)]
    assert bounds and all(entry.holds(bound) for bound in bounds)
    assert all(f"{bound:g}" in entry.text for bound in bounds)
    assert healthy_range("loss/total") is None
