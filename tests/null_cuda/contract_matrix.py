"""Steady steps of the matrix against the ledger: a launch more or a wait has its Python line."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.benchmarks.launches.counting import ROOT, config_of, count, plan_of, predicted_bytes
from m3i_fast.benchmarks.launches.gate import (
    beyond_the_ledger,
    never_in_a_step,
    newest_row,
    off_the_plan,
)
from m3i_fast.benchmarks.launches.matrix import CASES, GATED, IN_CI

NIGHTLY = [name for name in CASES if name not in IN_CI]


def complaints(name: str, folder: Path, plant: str | None = None) -> list[str]:
    """What is wrong with a case, by what no step may do, by the ledger and by plan's peak."""
    counted = count(CASES[name], folder, plant=plant)
    plan = plan_of(CASES[name], config_of(CASES[name], folder))
    memory = {"peak": counted.peak, "predicted": predicted_bytes(plan)}
    return [
        *never_in_a_step(counted),
        *beyond_the_ledger(counted, newest_row(name)),
        *off_the_plan({"case": name, "memory": memory}),
    ]


@pytest.mark.parametrize("name", IN_CI)
def test_a_steady_step_is_that_of_the_ledger(tmp_path: Path, name: str) -> None:
    assert complaints(name, tmp_path) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", NIGHTLY)
def test_the_whole_matrix_is_that_of_the_ledger(tmp_path: Path, name: str) -> None:
    assert complaints(name, tmp_path) == []


def line_of(statement: str) -> str:
    """FILE:LINE of a statement that one_case.py plants."""
    file = "benchmarks/launches/one_case.py"
    texts = (ROOT / file).read_text().splitlines()
    (number,) = (n for n, text in enumerate(texts, 1) if text.strip().startswith(statement))
    return f"{file}:{number}"


@pytest.mark.parametrize(
    ("plant", "said", "statement"),
    [
        ("wait", "1 waits of the host in a steady step", "loss.item()"),
        ("launches", "launches a step", "loss.neg_()"),
        ("pageable", "1 copies of pageable memory in a steady step", "torch.ones(1).to("),
    ],
)
def test_what_is_planted_is_told_with_its_line(
    tmp_path: Path, plant: str, said: str, statement: str
) -> None:
    assert "demo_clip" in GATED  # its row has the launches of each line
    counted = count(CASES["demo_clip"], tmp_path, plant=plant)
    found = [*never_in_a_step(counted), *beyond_the_ledger(counted, newest_row("demo_clip"))]
    number = 40 if plant == "launches" else 1
    assert any(said in each and f"{line_of(statement)} ({number})" in each for each in found), found
