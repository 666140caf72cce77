"""Exports of nsys, whole and damaged, and what is told of a step from them.

Those of a GPU are played back: files written in two schemas, since none is recorded without
NVIDIA's driver. What nsys records of a CPU is also recorded for real, in test_nsys_recording.py.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from m3i_fast.profiling.diff import compare_profiles, markdown
from m3i_fast.profiling.nsys.export import read_nsys
from m3i_fast.profiling.summary import Pace, Peak, summarise
from m3i_fast.profiling.summary_text import markdown as markdown_of
from tests.profiling.cpu_export import write_cpu_export
from tests.shared.nsys_files import Schema, write_export

PACE = Pace(before_ms=1.0, profiled_ms=1.02, after_ms=1.0)
BOTH: tuple[Schema, ...] = ("old", "new")


def _summary(path: Path, **changes: object) -> dict:  # type: ignore[type-arg]
    about = {"recipe": "demo", "profiler": "nsys", "device": "NVIDIA H100", "pace": PACE}
    return summarise(read_nsys(path), **(about | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("schema", BOTH)
def test_a_step_is_split_by_stage_family_and_stream(schema: Schema, tmp_path: Path) -> None:
    summary = _summary(write_export(tmp_path / "report.sqlite", schema))
    assert summary["kind"] == "cuda" and summary["num_steps"] == 2
    assert summary["step_ms"] == pytest.approx(1.0)
    assert {s["name"]: (s["ms"], s["device_ms"]) for s in summary["stages"]} == {
        "fwd.input": pytest.approx((0.3, 0.34)),
        "fwd.text": pytest.approx((0.1, 0.1)),
        "loss.caption": pytest.approx((0.1, 0.0)),
        "bwd": pytest.approx((0.4, 0.25)),
        "between stages": pytest.approx((0.1, 0.0)),
    }
    assert sum(stage["share"] for stage in summary["stages"]) == pytest.approx(1.0)
    assert {row["name"]: row["ms"] for row in summary["families"]} == {
        "gemm": pytest.approx(0.5),
        "comm": pytest.approx(0.2),
        "elementwise": pytest.approx(0.1),
        "memcpy": pytest.approx(0.04),
    }
    assert sum(row["share"] for row in summary["families"]) == pytest.approx(1.0)
    gpu = summary["gpu"]
    assert gpu["num_streams"] == 2
    assert gpu["busy_ms"] == pytest.approx(0.69) and gpu["idle_share"] == pytest.approx(0.31)
    assert gpu["longest_idle_ms"] == pytest.approx(0.15)
    assert gpu["comm_ms"] == pytest.approx(0.2) and gpu["comm_overlap"] == pytest.approx(0.75)


@pytest.mark.parametrize("schema", BOTH)
def test_kernels_are_named_and_counted(schema: Schema, tmp_path: Path) -> None:
    peak = Peak(name="h100", flop_s=989e12, byte_s=3350e9)
    summary = _summary(write_export(tmp_path / "report.sqlite", schema), peak=peak)
    rows = {row["name"]: row for row in summary["kernels"]}
    assert list(rows) == [
        "cutlass::Kernel2",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
        "at::native::vectorized_elementwise_kernel",
        "Memcpy HtoD",
    ]
    assert rows["cutlass::Kernel2"]["calls"] == 2 and rows["Memcpy HtoD"]["calls"] == 1
    assert rows["Memcpy HtoD"]["byte_s"] == pytest.approx(4096 / 40e-6)
    assert rows["Memcpy HtoD"]["of_peak_byte_s"] == pytest.approx(4096 / 40e-6 / 3350e9)
    assert rows["cutlass::Kernel2"]["flop_s"] is None  # nsys knows no shapes


@pytest.mark.parametrize("schema", BOTH)
def test_waits_and_notes(schema: Schema, tmp_path: Path) -> None:
    summary = _summary(write_export(tmp_path / "report.sqlite", schema))
    (wait,) = summary["device_waits"]
    assert wait["name"] == "cudaStreamSynchronize" and wait["stage"] == "between stages"
    assert wait["calls"] == 1 and wait["ms"] == pytest.approx(0.02)
    assert wait["stack"] == (["cudaStreamSynchronize", "at::item"] if schema == "new" else [])
    told = ["1 ranges were never closed and are left out"]
    if schema == "new":
        told.append("nsys: some events were dropped")
    assert summary["notes"] == told


@pytest.mark.parametrize("schema", BOTH)
def test_what_the_loader_launches_is_of_no_stage(schema: Schema, tmp_path: Path) -> None:
    """DALI's threads run beside the steps; autograd's launch what a stage of them asked for."""
    path = write_export(tmp_path / "report.sqlite", schema)
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE ThreadNames (globalTid, nameId)")
        for thread, name in ((1, "python"), (5, "pt_autograd_0"), (6, "[DALI][Executor]")):
            number = 100 + thread
            database.execute("INSERT INTO StringIds VALUES (?, ?)", (number, name))
            database.execute("INSERT INTO ThreadNames VALUES (?, ?)", (thread, number))
        calls = "UPDATE CUPTI_ACTIVITY_KIND_RUNTIME SET globalTid ="
        database.execute(f"{calls} 5 WHERE start % 1000000 IN (600000, 610000)")  # in bwd
        database.execute(f"{calls} 6 WHERE start % 1000000 IN (360000, 920000)")  # fwd.text, none
        database.commit()
    summary = _summary(path)
    rows = {s["name"]: (s["ms"], s["device_ms"], s["title"]) for s in summary["stages"]}
    assert rows["bwd"][:2] == pytest.approx((0.4, 0.25))
    assert rows["fwd.text"][:2] == pytest.approx((0.1, 0.0))
    assert rows["loader"] == (0.0, pytest.approx(0.1), "Loader, beside the steps")
    assert list(rows)[-1] == "loader" and summary["device_waits"] == []
    assert "| loader |" in markdown_of(summary)


def test_what_was_not_recorded_is_told_with_nsys_s_own_reason(tmp_path: Path) -> None:
    path = write_export(tmp_path / "report.sqlite", "new")
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL")
        database.commit()
    with pytest.raises(ValueError, match=r"--trace=cuda; nsys: some events were dropped$"):
        read_nsys(path)


def test_without_a_gpu_calls_of_the_operating_system_are_read(tmp_path: Path) -> None:
    summary = _summary(write_cpu_export(tmp_path / "report.sqlite"))
    assert summary["kind"] == "cpu" and summary["gpu"] is None and summary["kernels"] == []
    assert {s["name"]: (s["ms"], s["device_ms"]) for s in summary["stages"]} == {
        "fwd.input": (pytest.approx(0.3), None),
        "bwd": (pytest.approx(0.4), None),
        "between stages": (pytest.approx(0.3), None),
    }
    (call,) = summary["device_waits"]
    assert (call["name"], call["stage"], call["calls"]) == ("sem_wait", "fwd.input", 1)
    assert call["ms"] == pytest.approx(0.05)
    assert [(use["name"], use["num"], use["longest"]) for use in summary["threads"]] == [
        ("loader", 1, "pthread_cond_wait"),
        ("(ended)", 1, "clock_nanosleep"),
    ]
    assert [use["ms"] for use in summary["threads"]] == pytest.approx([1.0, 0.04])
    (operator,) = summary["loader"]
    assert (operator["name"], operator["calls"]) == ("decoders__Image", 1)
    assert operator["ms"] == pytest.approx(0.05) and summary["notes"] == []
    text = markdown_of(summary)
    assert "The thread of the steps is in such calls 5.0% of the step." in text
    assert "## Operators\n" not in text and "| loader | 1 | 0.5 | 1.000 |" in text


def test_a_timer_that_disagrees_is_told_of(tmp_path: Path) -> None:
    """By stage: of 300 and 400 ms; what is shorter than ten milliseconds is not compared."""
    path = write_cpu_export(tmp_path / "report.sqlite")
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE NVTX_EVENTS SET start = 1000 * start, end = 1000 * end")
        database.commit()
    assert _summary(path, own={"fwd.input": 305.0, "bwd": 393.0})["notes"] == []
    (note,) = _summary(path, own={"fwd.input": 280.0, "bwd": 401.0})["notes"]
    assert "DISAGREE on fwd.input 300.00 and 280.00 ms: the" in note
    short = _summary(write_cpu_export(tmp_path / "b.sqlite"), own={"bwd": 0.1})
    assert short["notes"] == [] and "| bwd | 0.400 | 40.0% | 0.100 |" in markdown_of(short)


def test_a_run_that_profiling_slowed_is_warned_of(tmp_path: Path) -> None:
    path = write_export(tmp_path / "report.sqlite", "old")
    summary = _summary(path, pace=Pace(before_ms=1.0, profiled_ms=2.4, after_ms=1.4))
    assert summary["pace"]["slowdown"] == pytest.approx(2.0)
    slowed, changed = summary["notes"][-2:]
    assert "PROFILING SLOWED THE RUN 2.00 times: 2.4 ms a step against 1.0 ms before" in slowed
    assert "OWN PACE CHANGED: 1.0 ms before and 1.4 ms after" in changed
    steady = _summary(path, pace=Pace(before_ms=1.0, profiled_ms=1.1, after_ms=1.05))
    assert not [note for note in steady["notes"] if "PACE" in note or "SLOWED" in note]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (
            "DROP TABLE CUPTI_ACTIVITY_KIND_KERNEL",
            "expected a table CUPTI_ACTIVITY_KIND_KERNEL.*=cuda",
        ),
        (
            "DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME",
            "expected a table CUPTI_ACTIVITY_KIND_RUNTIME.*=cuda",
        ),
        ("DROP TABLE NVTX_EVENTS", "expected a table NVTX_EVENTS.*--trace=nvtx"),
        (
            "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN correlationId",
            "CUPTI_ACTIVITY_KIND_KERNEL has no column correlationId; it has .*streamId",
        ),
        (
            "ALTER TABLE CUPTI_ACTIVITY_KIND_KERNEL DROP COLUMN shortName",
            "no column demangledName or shortName or name",
        ),
        ("DELETE FROM NVTX_EVENTS WHERE text = 'step'", "at least one whole range named 'step'"),
        ("UPDATE NVTX_EVENTS SET end = 0 WHERE text = 'step'", "whole range named 'step'"),
    ],
)
def test_what_is_not_there_is_named(sql: str, message: str, tmp_path: Path) -> None:
    path = write_export(tmp_path / "report.sqlite", "old")
    with closing(sqlite3.connect(path)) as database:
        database.execute(sql)
        database.commit()
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        read_nsys(path)


def test_a_step_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = write_export(tmp_path / "report.sqlite", "new")
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE NVTX_EVENTS SET end = NULL WHERE start = 1000000")
        database.commit()
    summary = _summary(path)
    assert summary["num_steps"] == 1 and summary["step_ms"] == pytest.approx(1.0)
    assert {row["name"]: row["calls"] for row in summary["kernels"]}["cutlass::Kernel2"] == 2
    assert summary["notes"][0] == "3 ranges were never closed and are left out"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_export(tmp_path / "report.sqlite", "new")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5000], b"no database at all, but a text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: not a whole SQLite file"):
            read_nsys(path)
    with pytest.raises(FileNotFoundError, match="expected an export of nsys"):
        read_nsys(tmp_path / "absent.sqlite")


def test_a_planted_slowdown_is_found(tmp_path: Path) -> None:
    a = _summary(write_export(tmp_path / "a.sqlite", "old"))
    b = _summary(write_export(tmp_path / "b.sqlite", "new", slow=120))
    found = compare_profiles(a, b)
    first, *others = found.kernels
    assert first.name == "at::native::vectorized_elementwise_kernel"
    assert first.delta_ms == pytest.approx(0.12) and first.why == "slower calls"
    assert all(abs(change.delta_ms) < 1e-9 for change in others)
    assert "| at::native::vectorized_elementwise_kernel | 0.100 | 0.220 | +0.120 |" in markdown(
        found
    )
