"""The page tells what the ledger's rows say of the plans that have ended, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.one_stage.main import finished
from m3i_fast.benchmarks.one_stage.plan import read_plan
from m3i_fast.benchmarks.one_stage.tables import comparisons, is_complete, secondary_table
from m3i_fast.benchmarks.one_stage.verdict import judge, page_table, sentences

PAGE = Path(__file__).parents[3] / "docs/measure/one_stage.md"


@pytest.mark.parametrize("name", ["second", "third"])
def test_the_tables_and_the_verdict_are_those_of_the_rows(name: str) -> None:
    plan = read_plan(name)
    rows = finished(plan, None)
    assert is_complete(plan, rows)
    compared = comparisons(plan, rows)
    text = PAGE.read_text()
    for table in (page_table(compared), secondary_table(plan, rows)):
        assert table in text, f"the page is to have this table:\n{table}"
    words = " ".join(text.split())
    for sentence in sentences(judge(compared)):
        assert sentence in words, f"the page is to say: {sentence}"
