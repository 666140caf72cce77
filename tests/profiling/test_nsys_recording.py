"""Recordings that a real nsys makes here, without a GPU: a known program, and runs of the demo.

What nsys records of a GPU needs NVIDIA's driver; test_nsys.py plays it back from written exports.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.cli import main
from m3i_fast.profiling.diff import compare_profiles
from m3i_fast.profiling.nsys.export import RANGES, read_nsys
from m3i_fast.profiling.nsys.program import ON_CPU, export
from m3i_fast.profiling.nsys.tables import Tables
from m3i_fast.profiling.summary import LONG_MS, Pace, read_summary, summarise
from tests.profiling import stages_under_nsys
from tests.profiling.stages_under_nsys import COMPUTE_MS, LOADER_MS, STEPS
from tests.shared.chromium import check_page
from tests.shared.chromium import skip_reason as no_browser

BIN = Path(__file__).parents[2] / "build" / "nsys" / "bin"
PATH = os.pathsep.join([*([str(BIN)] if (BIN / "nsys").exists() else []), os.environ["PATH"]])
PACE = Pace(before_ms=1.0, profiled_ms=1.0, after_ms=1.0)
CAPTURED = (*ON_CPU, "--capture-range-end=stop")
DOMAIN = 75  # the kind of event that names a domain of ranges
SLEEP_MS = 200
TOLERANCE = 0.02
TRAINING_STAGES = {
    *("data.wait", "h2d", "mix", "fwd.target", "fwd.input", "fwd.text", "bwd", "comm", "clip"),
    *("loss.intra", "loss.inter", "loss.category", "loss.caption", "loss.total"),
    *("optim", "ema", "log", "between stages"),
}

pytestmark = [
    pytest.mark.pages,
    pytest.mark.skipif(
        shutil.which("nsys", path=PATH) is None,
        reason="nsys is absent: python scripts/nsys.py fetches it, or says why it cannot",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", PATH)
        yield


# ---- A program whose stages are known ------------------------------------------------------------


def _record(folder: Path, *options: str, sleep_ms: int, num: int = 1) -> Path:
    """Record the program of stages_under_nsys and return the export; `own.json` is beside it."""
    folder.mkdir()
    program = [sys.executable, stages_under_nsys.__file__, str(folder / "own.json")]
    command = ["nsys", "profile", *options, "--sample=none", "--cpuctxsw=none"]
    command.append(f"--output={folder / 'report'}")
    subprocess.run(
        [*command, *program, str(sleep_ms), str(num)],
        check=True,
        env={**os.environ, "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0"},
        stdout=subprocess.DEVNULL,
    )
    return export(folder / "report.nsys-rep")


def _summary(path: Path) -> dict[str, Any]:
    own = json.loads((path.parent / "own.json").read_text())
    about = {"recipe": "known", "profiler": "nsys", "device": "a CPU"}
    return summarise(read_nsys(path), pace=PACE, own=own, **about)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _summary(_record(tmp_path_factory.mktemp("known") / "a", *CAPTURED, sleep_ms=SLEEP_MS))


def expect_agreement(summary: Mapping[str, Any], *, at_least: int) -> None:
    """Hold that nsys and the program's own timer tell the same of the stages long enough.

    Of their sum, and of every one but one: where another process takes the core between the two
    readings of a clock, that stage has its time slice, tens of milliseconds, in one of them only.
    """
    rows = [row for row in summary["stages"] if row["own_ms"] is not None]
    own = sum(row["own_ms"] for row in rows)
    assert sum(row["ms"] for row in rows) == pytest.approx(own, rel=TOLERANCE)
    long = [row for row in rows if row["own_ms"] >= LONG_MS]
    assert len(long) >= at_least, rows
    apart = [r for r in long if r["ms"] != pytest.approx(r["own_ms"], rel=TOLERANCE)]
    assert len(apart) <= 1, apart


def test_stages_of_a_known_program(known: dict[str, Any]) -> None:
    """Only the captured steps count, and a stage inside another one is not counted twice."""
    assert known["num_steps"] == STEPS and known["kind"] == "cpu"
    stages = {row["name"]: row["ms"] for row in known["stages"]}
    assert list(stages) == ["data.wait", "bwd", "comm", "log", "between stages"]
    assert stages["data.wait"] >= LOADER_MS and stages["comm"] >= SLEEP_MS
    assert stages["bwd"] >= 2 * COMPUTE_MS and stages["log"] < LONG_MS
    expect_agreement(known, at_least=3)


def test_calls_of_the_operating_system_are_found_in_their_stage(known: dict[str, Any]) -> None:
    calls = {(row["name"], row["stage"]): row for row in known["device_waits"]}
    (sleep,) = [row for (name, stage), row in calls.items() if stage == "comm" and row["ms"] > 1]
    assert sleep["name"] in ("clock_nanosleep", "nanosleep", "select")
    assert sleep["calls"] == 1 and sleep["ms"] >= SLEEP_MS
    in_loader = sum(row["ms"] for (_, stage), row in calls.items() if stage == "data.wait")
    stages = {row["name"]: row["ms"] for row in known["stages"]}
    assert 0.5 * LOADER_MS < in_loader <= stages["data.wait"]
    assert not [row for row in calls.values() if row["stage"] == "bwd" and row["ms"] > COMPUTE_MS]


def test_other_threads_are_found_by_their_names(known: dict[str, Any]) -> None:
    """A thread a step. nsys reads names late, so the ones that ended before that have none."""
    threads = {row["name"]: row for row in known["threads"]}
    assert set(threads) <= {"sleeper", "(ended)"}
    assert sum(row["num"] for row in threads.values()) == STEPS
    assert sum(row["ms"] for row in threads.values()) >= LOADER_MS
    assert all("sleep" in row["longest"] or row["longest"] == "select" for row in threads.values())


def test_a_planted_wait_is_what_a_difference_tells_first(
    known: dict[str, Any], tmp_path: Path
) -> None:
    slower = _summary(_record(tmp_path / "b", *CAPTURED, sleep_ms=3 * SLEEP_MS))
    found = compare_profiles(known, slower)
    assert found.stages[0].name == "comm" and found.stages[0].delta_ms > SLEEP_MS
    wait = found.waits[0]
    assert wait.name.endswith("sleep, comm") or wait.name == "select, comm"
    assert wait.delta_ms > SLEEP_MS and wait.why == "slower calls" and found.kernels == ()


def test_of_two_recorded_processes_one_is_read(tmp_path: Path) -> None:
    """As where nsys is started around torchrun: here without a capture, so of all five steps."""
    path = _record(tmp_path / "two", "--trace=nvtx,osrt", sleep_ms=SLEEP_MS, num=2)
    recording = read_nsys(path)
    assert len(recording.steps) == STEPS + 2
    assert recording.notes == ("steps of several threads: only those of the first are read",)
    assert sum(use.num for use in recording.threads) == STEPS + 2
    assert {stage.thread for stage in recording.stages} == {recording.steps[0].thread}


# ---- Runs of the demo ----------------------------------------------------------------------------


def _arguments(dataset: Path, out: Path) -> list[str]:
    options = {
        "--data.path": dataset,
        "--num-threads": 1,
        "--warmup": 2,
        "--steps": 3,
        "--profiler": "nsys",
        "--out": out,
    }
    return ["profile", "demo", *(str(part) for option in options.items() for part in option)]


@pytest.fixture(scope="module")
def profiled(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the demo under nsys, made by the verb."""
    out = tmp_path_factory.mktemp("nsys") / "out"
    assert main(_arguments(dataset, out)) == 0
    return out


@pytest.fixture(scope="module")
def of_two_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks of torchrun (gloo), of which the first is recorded."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "m3i_fast.cli", *_arguments(dataset, out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_a_run_is_recorded_and_read(profiled: Path) -> None:
    assert {path.name for path in profiled.iterdir()} == {
        *("report.nsys-rep", "report.sqlite", "windows.json", "config.json", "env.json"),
        *("summary.json", "summary.md", "profile.html"),
    }
    summary = read_summary(profiled)
    assert summary["profiler"] == "nsys" and summary["kind"] == "cpu"
    assert summary["num_steps"] == 3 and summary["kernels"] == [] and summary["gpu"] is None
    assert {row["name"] for row in summary["stages"]} == TRAINING_STAGES
    assert sum(row["share"] for row in summary["stages"]) == pytest.approx(1.0)


def test_times_agree_with_the_programs_own(profiled: Path) -> None:
    """Two clocks on one run: nsys's of the ranges, the timer's that every run logs."""
    summary = read_summary(profiled)
    expect_agreement(summary, at_least=4)
    assert summary["step_ms"] == pytest.approx(summary["pace"]["profiled_ms"], rel=TOLERANCE)


def test_the_loader_is_recorded(profiled: Path) -> None:
    """DALI runs every operator of the graph once a batch, on threads that it names itself."""
    summary = read_summary(profiled)
    operators = {row["name"]: row for row in summary["loader"]}
    for name in ("M3iRead", "decoders__Image", "M3iDrawViews", "M3iViews"):
        assert operators[name]["calls"] == pytest.approx(1, abs=0.5), name
        assert operators[name]["ms"] > 0, name
    names = {row["name"] for row in summary["threads"]}
    assert "[DALI] Executor" in names  # which hands out operators, and threads that work for them
    assert [name for name in names if name.startswith("[DALI][TP0]")]


def test_our_operators_mark_each_sample_in_a_domain_of_their_own(profiled: Path) -> None:
    """Inside each of DALI's ranges of an operator, which are whole: a capture may begin in one."""
    path = profiled / "report.sqlite"
    batch_size = json.loads((profiled / "config.json").read_text())["data"]["batch_size"]
    columns = "start", "end", "text?", "textId?", "eventType", "domainId", "int64Value"
    with closing(sqlite3.connect(path)) as database:
        tables = Tables(database, path)
        rows = [
            (begin, end, text or tables.text(text_id), *rest)
            for begin, end, text, text_id, *rest in tables.rows(RANGES, *columns)
        ]
    (domain,) = [of for *_, text, kind, of, _ in rows if kind == DOMAIN and text == "m3i_fast"]
    numbers: dict[str, list[list[int]]] = {}
    for operator, name in (
        ("M3iRead", "data.read"),
        ("M3iViews", "data.views"),
        ("M3iDrawViews", "data.draw"),
    ):
        ours = [row for row in rows if row[2] == name and row[4] == domain]
        whole = [row for row in rows if row[2].endswith(f" Run {operator}") and row[1]]
        numbers[name] = [[r[5] for r in ours if a <= r[0] <= r[1] <= b] for a, b, *_ in whole]
        assert numbers[name], name
    samples = [len(set(ids)) for ids in numbers["data.read"]]
    assert set(samples) == {batch_size}, "the ids of a batch's samples"
    assert all(sorted(each) == list(range(batch_size)) for each in numbers["data.views"])
    assert all(each == [batch_size] for each in numbers["data.draw"])


def test_the_threads_of_the_loader_without_dali_are_found_by_name(
    dataset: Path, tmp_path: Path
) -> None:
    """Linux has their names of us: Python tells it none before 3.14."""
    assert main([*_arguments(dataset, tmp_path / "out"), "--data.backend", "torch"]) == 0
    summary = read_summary(tmp_path / "out")
    assert summary["loader"] == []
    threads = {row["name"]: row for row in summary["threads"]}
    assert threads["m3i-read"]["ms"] > 0 and threads["m3i-views"]["ms"] > 0


def test_markdown_and_page_show_what_a_cpu_has(profiled: Path, tmp_path: Path) -> None:
    text = (profiled / "summary.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[0] == "Stages" and headings[2:] == [
        "Calls of the operating system by the thread of the steps",
        "Operators of the loader, on threads of its own",
        "Other threads in calls of the operating system",
    ]
    assert "| Stage | Host, ms | Share | Own timer, ms |" in text
    assert "operators are, by --profiler torch" in text
    if no_browser() is None:
        check_page(profiled / "profile.html", tmp_path, num_figures=0)


def test_the_first_of_two_ranks_is_recorded(of_two_ranks: Path) -> None:
    """It waits for the other one in calls of the OS, in the stages that communicate."""
    summary = read_summary(of_two_ranks)
    assert {row["name"] for row in summary["stages"]} == TRAINING_STAGES
    expect_agreement(summary, at_least=4)
    assert {"pt_gloo_runloop", "gloo_tcp_loop"} <= {row["name"] for row in summary["threads"]}
    waits = {row["stage"] for row in summary["device_waits"] if row["name"] == "pthread_cond_wait"}
    assert {"bwd", "loss.caption"} <= waits


def test_one_rank_against_two(
    profiled: Path, of_two_ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "diff", str(profiled), str(of_two_ranks)]) == 0
    told = capsys.readouterr().out
    assert "## Kernels or operators" not in told
    waits = told.split("## Waits that the profiler recorded")[1]
    assert re.search(r"\| pthread_cond_wait, loss\.caption \|.*\| new \|", waits)
