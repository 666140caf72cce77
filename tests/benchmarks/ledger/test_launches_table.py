"""The tables of what steps ask of a GPU, by rows of `bench launches`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.ledger import launches_table as table
from m3i_fast.benchmarks.ledger import readme_tables as readme
from m3i_fast.benchmarks.ledger import rows as ledger

Append = Callable[..., None]


def figures(case: str, recipe: str = "demo", **changes: Any) -> dict[str, Any]:
    counts = {
        **{"launches": 2000, "host_launches": 1500, "own_launches": 7},
        **dict.fromkeys(table.NEVER, 0),
        "copies": {"pinned to device": 8},
        "copied_bytes": {"pinned to device": 1024, "device to device": 2**21},
    }
    lines = {"a.py": {"x = y": 3, "backward of x = y": 5}, "b.py": {"z": 4}}
    return {
        **{"case": case, "recipe": recipe, "lines": lines},
        "counts": counts | {k: v for k, v in changes.items() if k in table.NEVER},
        "memory": {"peak": 100 * 2**20, "predicted": changes.get("predicted", 95 * 2**20)},
        "host": {"us_a_launch": 2.0, "bound": True},
    }


@pytest.fixture
def append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Append:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    return lambda made: ledger.append_row(table.SUBJECT, made, command="bench launches")


def test_recipes_and_settings_have_their_newest_rows(append: Append) -> None:
    for made in (
        figures("demo", waits=1),
        figures("demo, lamb"),
        figures("demo_clip", "demo_clip", predicted=200 * 2**20),
        figures("demo"),
    ):
        append(made)
    lines = readme.launches().splitlines()
    assert lines[2] == (
        "| `demo` | 2,000 | 1,500 | 7 | 8 (1,024 B) | 2.0 | 100.0 | -5.0% | 2.00 (host) | yes |"
    )
    assert lines[3].endswith("| +100.0% | 2.00 (host) | no |") and "`demo_clip`" in lines[3]
    assert "1 of 2 green" in lines[5] and "by no GPU" in lines[5]
    assert readme.launches_of_settings().splitlines()[2].startswith("| lamb | 2,000 |")


@pytest.mark.parametrize("name", table.NEVER)
def test_what_no_step_may_do_is_not_green(name: str) -> None:
    assert table.is_green(figures("demo"))
    assert not table.is_green(figures("demo", **{name: 1}))


def test_launches_are_divided_among_modules(append: Append) -> None:
    append(figures("demo"))
    lines = readme.launches_by_module().splitlines()
    assert lines[2:4] == ["| `a.py` | 3 | 5 | 0% |", "| `b.py` | 4 | 0 | 0% |"]
    assert lines[-1] == "Of 2,000 launches of a step of `demo`."
