"""One run, its samples shared out in any way: the same inputs and draws, and the same weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.engine.trainer import Trainer
from tests.engine.run.split_work import (
    NUM_STEPS,
    WHOLE,
    Split,
    run,
    small_config,
    sorted_by_position,
)
from tests.shared.engine.drawn_data import DrawnData

ALONE = Split(1, WHOLE)
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run(ALONE, small_config(), tmp_path_factory.mktemp("alone") / "run")


def assert_same_run(found: Found, expected: Found, *, first: int = 0) -> None:
    """Positions, samples, inputs, masks and branches bit for bit; losses and weights to 1e-10.

    first: step from which on there is something to compare.
    """
    ours, theirs = sorted_by_position(found), sorted_by_position(expected)
    assert ours.keys() == theirs.keys()
    since = theirs["step"] >= first
    for name, rows in theirs.items():
        assert torch.equal(ours[name], rows[since]), name
    assert ours["position"].tolist() == list(range(first * WHOLE, NUM_STEPS * WHOLE))
    for of_rank in found:
        losses = {step: v for step, v in expected[0]["losses"].items() if step >= first}
        torch.testing.assert_close(of_rank["losses"], losses, rtol=1e-10, atol=1e-10)
        for name, weights in expected[0]["weights"].items():
            torch.testing.assert_close(
                of_rank["weights"][name],
                weights,
                rtol=1e-10,
                atol=1e-10,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_what_is_compared_differs_from_sample_to_sample(whole: Found) -> None:
    """Else equality would say nothing; samples come again, with other draws."""
    rows = sorted_by_position(whole)
    assert len(rows["position"]) == NUM_STEPS * WHOLE
    assert len(rows["sample_id"].unique()) == 75
    for name in ("boxes", "token_priority", "branches", "token_index", "own_query"):
        distinct = len(rows[name].flatten(1).unique(dim=0))
        assert distinct > (300 if name != "own_query" else 100), name
    assert (rows["others of the input"].diff(dim=1) == 1).all()


@pytest.mark.parametrize(
    "split",
    [
        Split(2, 16),
        Split(2, 8, 2),
        pytest.param(Split(4, 8), marks=pytest.mark.distributed),
        pytest.param(Split(8, 4), marks=pytest.mark.distributed),
        pytest.param(Split(1, 8, 4), marks=pytest.mark.distributed),
    ],
    ids=str,
)
def test_every_split_is_the_same_run(split: Split, whole: Found, tmp_path: Path) -> None:
    assert_same_run(run(split, small_config(), tmp_path / "run"), whole)


def test_a_run_goes_on_with_another_split(whole: Found, tmp_path: Path) -> None:
    """Stopped twice: two ranks, then one process, then two ranks that accumulate."""
    cfg, out = small_config(), tmp_path / "run"
    run(Split(2, 16), cfg, out, until=6)
    run(Split(1, 32), cfg, out, until=11, resume=True)
    assert_same_run(run(Split(2, 8, 2), cfg, out, resume=True), whole, first=11)


def test_another_whole_batch_goes_on_at_the_next_sample(
    whole: Found, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is from there on the run of that batch, whatever the ranks."""
    cfg, out = small_config(), tmp_path / "run"
    [begun] = run(ALONE, cfg, out, until=3)
    other = Split(1, 12)
    data = DrawnData(other.of(cfg))
    with pytest.raises(ValueError, match=r"a step took 32 samples, 1 rank x 32, and would take 12"):
        Trainer(other.of(cfg), out, resume=True, data=data)
    with caplog.at_level(logging.WARNING):
        [found] = run(other, cfg, out, until=9, resume=True)
    assert (
        "1 rank x 12 in place of 1 rank x 32, from step 3 on: a step takes 12 samples, before 32"
        in caplog.text
    )
    rows, expected = sorted_by_position([begun, found]), sorted_by_position(whole)
    taken = 3 * 32 + 6 * 12
    for name in rows.keys() - {"step"}:
        assert torch.equal(rows[name], expected[name][:taken]), name
    assert rows["step"].bincount().tolist() == [32] * 3 + [12] * 6
