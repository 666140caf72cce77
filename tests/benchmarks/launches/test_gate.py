"""What the gate says of a step, by the lines that are new."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from m3i_fast.benchmarks.launches import gate
from m3i_fast.benchmarks.launches.counting import (
    Counted,
    by_text,
    counts_of,
    launches_by_line,
)
from m3i_fast.benchmarks.launches.matrix import CASES
from m3i_fast.benchmarks.launches.trace import StepTrace

# Two lines of a file that is there.
FILE = "benchmarks/launches/__init__.py"
LINE, OTHER = f"{FILE}:1", "benchmarks/__init__.py:1"


def record(kind: str, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "thread": 0, "device": 0, **values}


def launches(number: int, line: str | None, **values: Any) -> list[dict[str, Any]]:
    own = {} if line is None else {"line": line}
    return [record("launch", name="m3i::k", stream=0, **own, **values) for _ in range(number)]


def counted(*records: dict[str, Any]) -> Counted:
    memory = {"allocated": 100, "requested": 90, "reserved": 200}
    return Counted(case=CASES["demo"], step=StepTrace("step 3", list(records)), memory=memory)


def row_of(made: Counted) -> dict[str, Any]:
    lines = by_text(launches_by_line(made.step))
    return {"figures": {"case": "demo", "counts": counts_of(made.step), "lines": lines}}


BEFORE = [*launches(20, LINE), *launches(3, f"backward of {LINE}"), *launches(2, None)]


def test_an_equal_step_passes() -> None:
    made = counted(*BEFORE)
    assert gate.never_in_a_step(made) == []
    assert gate.beyond_the_ledger(made, row_of(made)) == []


@pytest.mark.parametrize("more", [gate.MARGIN, gate.MARGIN + 1])
def test_more_launches_are_told_with_their_lines(more: int) -> None:
    made = counted(*BEFORE, *launches(more - 2, LINE), *launches(2, f"backward of {LINE}"))
    told = gate.beyond_the_ledger(made, row_of(counted(*BEFORE)))
    assert len(told) == 2 * (more > gate.MARGIN)  # all, and those of the host
    for each in told:
        assert f"25 in the ledger; more at {LINE} (7), backward of {LINE} (2);" in each
        assert "demo: 34 " in each and "m3i-fast bench launches --only 'demo'" in each


def test_a_line_that_moved_is_not_new() -> None:
    row = row_of(counted(*BEFORE))
    (text,) = row["figures"]["lines"][FILE].keys() - {
        key for key in row["figures"]["lines"][FILE] if key.startswith("backward of ")
    }
    assert text.startswith('"""What a training step asks of a GPU')
    made = counted(*BEFORE, *launches(40, f"{OTHER}"))
    assert gate.new_lines(made, row) == Counter({OTHER: 40})


def test_fewer_launches_ask_for_a_row_and_name_no_line() -> None:
    told = gate.beyond_the_ledger(counted(*BEFORE[10:]), row_of(counted(*BEFORE)))
    assert "demo: 15 launches a step, 25 in the ledger; if it is meant to be so" in told[0]


def test_another_stream_is_told() -> None:
    made = counted(*BEFORE, record("fill", bytes=8, stream=4))
    (told,) = gate.beyond_the_ledger(made, row_of(counted(*BEFORE)))
    assert told == "demo: work on the streams [0, 4], in the ledger [0]"


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (record("wait", call="w", stream=0, line=LINE), "1 waits of the host in a steady step"),
        (record("allocate", side="device", bytes=8), "1 allocations in a steady step, at ? (1)"),
        (record("fault", what="f", line=LINE), "1 errors, faults or unsupported calls"),
        (
            record("copy", **{"from": "pageable", "to": "device"}, bytes=4, stream=0, line=LINE),
            "1 copies of pageable memory",
        ),
    ],
)
def test_what_no_step_may_do_is_told_with_its_line(new: dict[str, Any], said: str) -> None:
    (told,) = gate.never_in_a_step(counted(*BEFORE, new))
    assert said in told and told.endswith(f"at {new.get('line', '?')} (1)")


def test_a_pinned_copy_is_none_of_them() -> None:
    pinned = record("copy", **{"from": "pinned", "to": "device"}, bytes=4, stream=0)
    made = counted(*BEFORE, pinned)
    assert gate.never_in_a_step(made) == []
    assert counts_of(made.step)["copied_bytes"] == {"pinned to device": 4}


def test_a_peak_that_plan_does_not_predict_is_told() -> None:
    for predicted, wrong in ((90, 0), (110, 0), (89, 1), (111, 1)):
        memory = {"peak": 100, "predicted": predicted}
        told = gate.off_the_plan({"case": "demo", "memory": memory})
        assert len(told) == wrong
    assert told[0].endswith("peak of 111 bytes, torch's allocator has 100: +11%, allowed 10%")


def test_a_case_without_a_row_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.ledger, "read_rows", lambda _: iter(()))
    with pytest.raises(ValueError, match="demo: no row in launches.jsonl; `m3i-fast bench"):
        gate.newest_row("demo")
