"""The harness times what it is given and appends rows that it reads back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table

from m3i_fast.benchmarks import harness
from m3i_fast.benchmarks.harness import append_row, measure, read_rows


def test_measure_finds_the_time_of_a_call() -> None:
    timing = measure({"sleep": lambda: time.sleep(0.01)}, num_samples=5, warmup_s=0.0)["sleep"]
    assert timing.num_samples == 5
    assert 10.0 <= timing.p20_ms <= timing.median_ms <= timing.p80_ms < 100.0


def test_measure_repeats_short_calls_until_a_sample_is_long() -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    timing = measure({"count": count}, num_samples=3, warmup_s=0.001)["count"]
    assert calls > 300
    assert timing.median_ms < 0.1


def test_measure_takes_turns_at_going_first() -> None:
    order: list[str] = []

    def slow(name: str) -> None:
        time.sleep(2 * harness.MIN_SAMPLE_S)
        order.append(name)

    functions = {name: (lambda name=name: slow(name)) for name in "abc"}
    measure(functions, num_samples=3, warmup_s=0.0)
    assert "".join(order[-9:]) == "abcbcacab"


def test_measure_wants_a_sample() -> None:
    with pytest.raises(ValueError, match="num_samples: expected at least 1, got 0"):
        measure({"nothing": lambda: None}, num_samples=0)


@pytest.mark.gpu
def test_measure_waits_for_the_gpu() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    timing = measure({"matmul": lambda: a @ a, "add": lambda: a + a}, device="cuda", num_samples=5)
    assert timing["matmul"].median_ms > timing["add"].median_ms > 0


def test_row_has_what_a_reader_needs(tmp_path: Path) -> None:
    path = append_row("speed", {"ms": 1.5}, command="python -m speed", folder=tmp_path)
    assert path == tmp_path / "speed.jsonl"
    (row,) = read_rows("speed", folder=tmp_path)
    assert list(row) == ["schema", "subject", "commit", "machine", "time", "command", "figures"]
    assert (row["schema"], row["subject"], row["command"]) == (1, "speed", "python -m speed")
    assert row["figures"] == {"ms": 1.5}
    assert row["machine"]["torch"] == torch.__version__
    assert row["machine"]["num_cores"] >= 1
    assert set(row["machine"]) == {"cpu", "num_cores", "gpu", "num_gpus", "torch", "cuda", "python"}
    age = datetime.now(timezone.utc) - datetime.fromisoformat(row["time"])
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)


def test_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    append_row("speed", {}, folder=tmp_path)
    (row,) = read_rows("speed", folder=tmp_path)
    root = Path(__file__).parents[2]
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert head.startswith((row["commit"] or "").removesuffix("-dirty"))


def test_rows_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        writers = [
            pool.submit(append_row, "speed", {"i": i, "pad": "x" * 9000}, folder=tmp_path)
            for i in range(24)
        ]
    assert all(writer.result().is_file() for writer in writers)
    assert sorted(row["figures"]["i"] for row in read_rows("speed", folder=tmp_path)) == [
        *range(24)
    ]


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), Path("x")])
def test_figures_json_cannot_hold_are_refused(figure: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figures of speed: expected finite JSON values"):
        append_row("speed", {"ms": figure}, folder=tmp_path)
    assert not (tmp_path / "speed.jsonl").exists()


def test_subject_is_a_file_stem(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"subject: .* got '\.\./speed'"):
        append_row("../speed", {}, folder=tmp_path)


def test_no_ledger_has_no_rows(tmp_path: Path) -> None:
    assert list(read_rows("speed", folder=tmp_path)) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "expected a row"), ("[]", "expected a row"), ('{"schema": 9}', "schema 1, got 9")],
)
def test_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = append_row("speed", {}, folder=tmp_path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=f"speed.jsonl:2: .*{message}"):
        list(read_rows("speed", folder=tmp_path))


def test_ledger_is_the_checkouts() -> None:
    assert harness.results_dir() == Path(__file__).parents[2] / "benchmarks" / "results"


def test_ledger_of_an_installed_package_is_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "site" / "benchmarks" / "harness.py"))
    monkeypatch.chdir(tmp_path)
    path = append_row("speed", {})
    assert path.resolve() == tmp_path / "benchmarks" / "results" / "speed.jsonl"
    assert json.loads(path.read_text())["subject"] == "speed"


def test_command_names_the_module(tmp_path: Path) -> None:
    (tmp_path / "speed.py").write_text(
        "from pathlib import Path\n"
        "from m3i_fast.benchmarks.harness import append_row\n"
        "append_row('speed', {}, folder=Path('ledger'))\n"
    )
    subprocess.run(
        [sys.executable, "-m", "speed", "--size", "a b"], cwd=tmp_path, check=True, timeout=120
    )
    (row,) = read_rows("speed", folder=tmp_path / "ledger")
    assert row["command"] == "python -m speed --size 'a b'"


def test_rows_measured_before_an_interruption_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "results_dir", lambda: tmp_path)

    def rows() -> Iterator[dict[str, Any]]:
        yield {"ms": 1.0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.publish("speed", rows(), lambda _: Table(), record=True)
    assert [row["figures"] for row in read_rows("speed", folder=tmp_path)] == [{"ms": 1.0}]
