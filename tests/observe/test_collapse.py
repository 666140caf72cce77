"""When the watch speaks: after the warm-up, of a metric that stays out of its range, once."""

import math

import pytest

from m3i_fast.observe.collapse import HEALTHY, PATIENCE, CollapseWatch, healthy

BAD, GOOD = {"monitor/target_rank": 1.0}, {"monitor/target_rank": 20.0}


def _spoken(rows: list[dict[str, float]], first_step: int = 0) -> list[tuple[int, str]]:
    watch = CollapseWatch(first_step=first_step)
    return [
        (step, collapse.name)
        for step, row in enumerate(rows, start=1)
        for collapse in watch.see(step, row)
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
    found = [c for step in (5, 10, 15) for c in watch.see(step, {"monitor/b_log_scale": 2500.0})]
    text = str(found[0])
    for part in ("step 15", "monitor/b_log_scale = 2500", "0.999 to 100.1", "saturated"):
        assert part in text
    assert "objective.temperature" in text


@pytest.mark.parametrize("entry", HEALTHY, ids=lambda entry: entry.pattern)
def test_every_range_is_found_by_name_and_has_a_bound(entry) -> None:  # type: ignore[no-untyped-def]
    name = entry.pattern.replace("*", "caption")
    assert healthy(name) is entry
    bounds = [bound for bound in (entry.low, entry.high) if math.isfinite(bound)]
    assert bounds and all(entry.holds(bound) for bound in bounds)
    assert all(f"{bound:g}" in entry.text for bound in bounds)
    assert healthy("loss/total") is None
