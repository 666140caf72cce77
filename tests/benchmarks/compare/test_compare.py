"""Two versions are compared by what was measured alike; an alarm is an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast import op_registry
from m3i_fast.benchmarks.compare import main as compare
from m3i_fast.benchmarks.compare import worker as compare_worker
from m3i_fast.benchmarks.compare.gate import judge
from m3i_fast.benchmarks.compare.versions import Plan, Version, Worker, built, sample_in_turns
from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.cli import bench

ROOT = Path(__file__).parents[3]
OLD = "0123456789ab"
Append = Callable[..., None]


@pytest.fixture
def append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Append:
    """Appends a row of the subject `speed`, measured on this machine at this commit if not said."""
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)

    def row(median_ms: float, *, samples: bool = True, size: int = 3, **changes: Any) -> None:
        rng = np.random.default_rng([size, round(100 * median_ms)])
        taken = [round(x, 4) for x in median_ms * rng.normal(1, 0.02, 60)]
        timing: dict[str, Any] = {"median_ms": median_ms, "p20_ms": 1, "p80_ms": 2}
        timing |= {"num_samples": 60} | ({"samples_ms": taken} if samples else {})
        made = ledger.make_row("speed", {"size": size, "timings": {"m3i_fast": timing}})
        with (tmp_path / "speed.jsonl").open("a") as file:
            file.write(json.dumps({**made, **changes}) + "\n")

    return row


# ---- Rows of the ledger --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "status", "words"),
    [
        (1.0, 0, "no difference that counts"),
        (1.03, 0, "no difference that counts"),
        (1.05, 0, "not settled: an interval holds the threshold"),
        (1.2, 1, "slower than the baseline"),
        (0.8, 1, "refresh the baseline"),
    ],
)
def test_rows_of_this_commit_are_compared_with_those_of_another(
    append: Append, now: float, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    append(5.0, commit="fedcba987654")  # older than the newest other commit
    append(9.0, commit=OLD)  # of which the newest row counts
    append(1.0, commit=OLD)
    append(now)
    assert bench.main(["compare", "speed"]) == status
    assert words in capsys.readouterr().out
    assert bench.main(["compare", "speed", "--baseline", "fedcba"]) == 1


def test_each_size_is_compared_with_its_own(append: Append) -> None:
    for size, before, now in ((1, 1.0, 1.0), (2, 4.0, 8.0)):
        append(before, size=size, commit=OLD)
        append(now, size=size)
    append(1.0, size=3)
    verdicts = compare.compare_rows(compare.Config(subject="speed"))
    assert [verdict.alarm for verdict in verdicts.values()] == [None, "slower"]


def test_alpha_is_shared_by_all_rows(append: Append, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recording(*groups: Any, alpha: float, **how: Any) -> Any:
        asked.append(alpha)
        return judge(*groups, alpha=alpha, **how)

    monkeypatch.setattr(compare, "judge", recording)
    for size in range(4):
        append(1.0, size=size, commit=OLD)
        append(1.0, size=size)
    compare.compare_rows(compare.Config(subject="speed", alpha=0.02))
    assert asked == [0.005] * 4


OTHER = {"commit": OLD, "machine_class": "64 cores of another CPU"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected one with timings of m3i_fast in the ledger, got 'speed'"),
        ([{"commit": OLD}], "no row of speed is of this commit"),
        ([{}], "no row of speed is of another commit"),
        ([OTHER, {}], r"are of other machines: expected .* got 64 cores of another CPU"),
        ([{"commit": OLD, "size": 7}, {}], "settings differ in size"),
        ([{"commit": OLD, "samples": False}, {}], f"the row of speed of {OLD}.*has no samples"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    append: Append, rows: list[dict[str, Any]], message: str
) -> None:
    for changes in rows:
        append(1.0, **changes)
    with pytest.raises(ValueError, match=message):
        compare.compare_rows(compare.Config(subject="speed"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subject": "demo", "against": "HEAD"}, "subject: expected one of mask_mix, dcnv3"),
        ({"against": "HEAD", "self_test": 2}, "expected one of --against"),
        ({"alpha": 1.5}, "alpha: expected a probability"),
        ({"pairs": 0}, "pairs: expected at least 1"),
        ({"looks": 0}, "looks: expected at least 1"),
        ({"threshold": -1.0}, "threshold: expected at least 0"),
        ({"planted": 0.15}, "planted: expected whole tenths"),
    ],
)
def test_a_wrong_request_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.Config(**{"subject": "gaussian", **wrong})


# ---- Two versions --------------------------------------------------------------------------------


def test_processes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[float] = []
    take = Worker.sample

    def noted(worker: Worker, calls: int) -> float:
        order.append(worker._version.planted)
        return take(worker, calls)

    monkeypatch.setattr(Worker, "sample", noted)
    plan = Plan("gaussian", pairs=2, samples=16, sample_ms=1.0)
    groups = sample_in_turns(plan, (Version(), Version(planted=1.0)))
    assert [[len(group) for group in version] for version in groups] == [[16, 16]] * 2
    assert all(set(pair) == {0.0, 1.0} for pair in zip(order[::2], order[1::2], strict=True))


def test_planted_calls_take_time_but_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(compare_worker.time, "perf_counter", lambda: now)

    def call_of_2_ms() -> None:
        nonlocal now
        now += 2e-3

    assert compare_worker.sample_ms(call_of_2_ms, calls=8, extra=0) == pytest.approx(2.0)
    assert compare_worker.sample_ms(call_of_2_ms, calls=8, extra=4) == pytest.approx(3.0)


@pytest.mark.parametrize("work", [op.name for op in op_registry.OPS])
def test_every_op_has_a_work(work: str) -> None:
    compare_worker.works(op_registry.__file__)[work]()()


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"ended: \w+Error: .*m3i_fast"),
        Worker(Plan("gaussian"), Version(site=tmp_path)) as worker,
    ):
        worker.wait_until_warm()


def test_self_test_leaves_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ledger, "results_dir", lambda: tmp_path)
    arguments = "gaussian --self-test 1 --pairs 1 --samples 4 --sample-ms 0.1 --planted 9.0"
    assert compare.main(arguments.split()) == 0
    (row,) = ledger.read_rows("gate")
    figures = row["figures"]
    assert figures["work"] == "gaussian" and figures["slowdown"] == 9.0
    assert [figures[name]["comparisons"] for name in ("unchanged", "planted")] == [1, 1]
    assert figures["planted"]["ratios"][0] > 1.5  # ten times the work
    assert "planted 1: " in capsys.readouterr().out


def _worktrees() -> list[str]:
    shown = subprocess.run(
        ["git", "-C", ROOT, "worktree", "list", "--porcelain"], capture_output=True, text=True
    )
    return [line for line in shown.stdout.splitlines() if line.startswith("worktree ")]


def test_no_commit_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="--against nonsense: expected a commit"),
        built("nonsense"),
    ):
        pass


@pytest.mark.nightly  # compiles the other commit
def test_another_commit_is_built_measured_and_gone() -> None:
    before = _worktrees()
    command = "compare gaussian --against HEAD --pairs 1 --samples 10 --threshold 3"
    done = subprocess.run(
        [sys.executable, "-m", "m3i_fast.cli", "bench", *command.split()],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "this version against HEAD" in done.stdout
    assert _worktrees() == before
