"""m3i-fast profile under nsys: a child that a stand-in plays, and when it is chosen."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from m3i_fast.cli import main
from m3i_fast.observe import nvtx
from m3i_fast.observe.stages import StageTimer
from m3i_fast.profiling.capture import CAPTURE, NsysProfiler, Windows
from m3i_fast.profiling.nsys.export import read_nsys
from m3i_fast.profiling.nsys.program import export, run_under_nsys
from m3i_fast.profiling.profile_run import (
    ProfileRun,
    choose_profiler,
    peak_of,
    record,
    write_summary,
)
from m3i_fast.profiling.recording import STEP
from m3i_fast.profiling.summary import Peak, read_summary
from m3i_fast.recipes import demo
from tests.cli.test_profile import _config
from tests.shared.nsys_files import write_export

GPU, CPU = torch.device("cuda"), torch.device("cpu")
NSYS = f"""#!{sys.executable}
import json, os, shutil, signal, sys, time
verb, options = sys.argv[1], [a for a in sys.argv[2:] if a.startswith("--")]
given = dict(option.partition("=")[::2] for option in options)
with open(os.environ["NSYS_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("NSYS_FAILS") == verb:
    sys.exit("no permission")
if os.environ.get("NSYS_HANGS"):
    def end(number, frame):
        with open(os.environ["NSYS_LOG"], "a") as log:
            log.write('"ended"\\n')
        sys.exit(0)
    signal.signal(signal.SIGTERM, end)
    os.kill(os.getppid(), int(os.environ["NSYS_HANGS"]))
    time.sleep(60)
if verb == "profile":
    open(given["--output"] + ".nsys-rep", "w").close()
else:
    shutil.copy(os.environ["NSYS_EXPORT"], given["--output"])
"""


@pytest.fixture
def nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name on PATH, which notes its arguments; returns where."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nsys").write_text(NSYS)
    (folder / "nsys").chmod(0o755)
    log = tmp_path / "nsys.log"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NSYS_LOG", str(log))
    monkeypatch.setenv("NSYS_EXPORT", str(write_export(tmp_path / "made.sqlite", "new")))
    return log


def test_nsys_runs_the_verb_again_and_exports(nsys: Path, tmp_path: Path) -> None:
    report = run_under_nsys(["profile", "demo", "--inside-nsys"], tmp_path, GPU)
    assert len(read_nsys(export(report)).steps) == 2
    profile, exported = map(json.loads, nsys.read_text().splitlines())
    assert profile[0] == "profile" and "--capture-range=cudaProfilerApi" in profile
    assert "--capture-range-end=stop" in profile and "--trace=cuda,nvtx,cublas,cudnn" in profile
    assert profile[-5:] == ["-m", "m3i_fast.cli", "profile", "demo", "--inside-nsys"]
    assert exported[:2] == ["export", "--type=sqlite"] and exported[-1] == str(report)


def test_on_a_cpu_nsys_records_the_operating_system(nsys: Path, tmp_path: Path) -> None:
    run_under_nsys(["profile", "demo", "--inside-nsys"], tmp_path, CPU)
    profile = json.loads(nsys.read_text())
    assert {"--trace=nvtx,osrt", "--capture-range=nvtx", f"--nvtx-capture={CAPTURE}"} < set(profile)
    assert not [option for option in profile if "cuda" in option and option.startswith("--")]


@pytest.mark.parametrize("verb", ["profile", "export"])
def test_a_failure_of_nsys_is_an_error(
    verb: str, nsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSYS_FAILS", verb)
    with pytest.raises(RuntimeError, match=f"nsys {verb} ended with 1"):
        export(run_under_nsys(["profile", "demo"], tmp_path, GPU))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_nsys_ends_with_this_program(
    number: int,
    error: type[BaseException],
    nsys: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NSYS_HANGS", str(int(number)))
    with pytest.raises(error):
        run_under_nsys(["profile", "demo"], tmp_path, GPU)
    assert [json.loads(line) for line in nsys.read_text().splitlines()][1:] == ["ended"]


def test_on_a_gpu_the_capture_is_cudas(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, partial(told.append, name))
    profiler, timer = NsysProfiler(GPU), StageTimer(CPU)
    profiler.start(timer)
    assert told == ["start"]
    profiler.stop(timer)
    assert told == ["start", "stop"]


def test_on_a_cpu_the_capture_is_a_range_around_the_steady_steps(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every range is closed before the one around it, in and outside the capture."""
    open_: list[str] = []
    within: list[tuple[str, ...]] = []

    def push(name: str) -> None:
        open_.append(name)
        within.append(tuple(open_))

    monkeypatch.setattr(nvtx, "push", push)
    monkeypatch.setattr(nvtx, "pop", lambda: open_.pop())
    config, out = tmp_path / "tiny.json", tmp_path / "out"
    _config(dataset).save(config)
    out.mkdir()
    counts = ["--warmup", "1", "--steps", "2"]
    arguments = ["profile", "--config", str(config), *counts, "--out", str(out), "--inside-nsys"]
    assert main(arguments) == 0
    assert open_ == [] and [path.name for path in out.iterdir()] == ["windows.json"]
    assert within.count((CAPTURE,)) == 1 and within.count((CAPTURE, STEP)) == 2
    assert within.count((STEP,)) == 1 + 2 + 2  # warm-up, before, after
    assert within.count((CAPTURE, STEP, "bwd")) == 2 and within.count((STEP, "bwd")) == 5
    own = json.loads((out / "windows.json").read_text())["stages"]
    assert set(own) == {names[-1] for names in within if len(names) > 2} | {"log"}


def test_a_recording_of_nsys_becomes_a_summary(
    nsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what nsys and the program under it leave."""
    pace = {"before_ms": 1.0, "profiled_ms": 1.0, "after_ms": 1.0}
    wait = {"name": "aten::nonzero", "stage": "mix", "stack": ["a.py:1 f"], "calls": 2}
    (tmp_path / "windows.json").write_text(
        json.dumps({"pace": pace, "stages": {"bwd": 0.4}, "waits": [wait]})
    )
    run = ProfileRun(
        recipe="demo",
        config=demo(),
        windows=Windows(warmup=10, steps=5),
        out=tmp_path,
        arguments=["demo", "--out", str(tmp_path)],
    )
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    write_summary(run, record(run, "nsys", device), "nsys", device)
    summary = read_summary(tmp_path)
    assert summary["profiler"] == "nsys" and summary["peak"]["name"] == "h100"
    assert summary["step_ms"] == pytest.approx(1.0) and summary["waits"] == [wait]
    assert "| aten::nonzero | mix | 2 | a.py:1 f |" in (tmp_path / "summary.md").read_text()


def test_nsys_is_chosen_where_there_is_a_gpu_and_nsys(
    nsys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_profiler("auto", GPU) == "nsys" and choose_profiler("nsys", GPU) == "nsys"
    assert choose_profiler("torch", GPU) == "torch" and choose_profiler("auto", CPU) == "torch"
    assert choose_profiler("nsys", CPU) == "nsys"
    monkeypatch.setenv("PATH", "")
    assert choose_profiler("auto", GPU) == "torch"
    for device in (GPU, CPU):
        with pytest.raises(ValueError, match="got nsys: it is not on PATH"):
            choose_profiler("nsys", device)


@pytest.mark.parametrize(
    ("device", "card", "flop_s", "byte_s"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989e12, 3350e9),
        ("NVIDIA H100 PCIe", "h100_pcie", 756e12, 2000e9),
        ("NVIDIA H100 NVL", "h100_nvl", 835e12, 3900e9),
        ("NVIDIA H200 NVL", "h200_nvl", 835e12, 4800e9),
        ("NVIDIA B200", "b200", 2250e12, 8000e9),
    ],
)
def test_peaks_are_of_the_very_card(device: str, card: str, flop_s: float, byte_s: float) -> None:
    """NVIDIA's data sheets; a PCIe card is no SXM module of the same chip."""
    assert peak_of(device) == Peak(name=card, flop_s=flop_s, byte_s=byte_s)


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA GeForce RTX 3090",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H100 NVL MIG 1g.12gb",
    ],
)
def test_a_card_without_a_published_peak_is_named(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert peak_of(device) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no shares of a peak: {device}: ")
