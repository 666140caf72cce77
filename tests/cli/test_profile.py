"""m3i-fast profile: a real profile of a CPU, captures that close, nsys as a child, differences."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.cli import main
from m3i_fast.cli.profile import choose_profiler, parse, peak_of, record, write_summary
from m3i_fast.cli.profile_nsys import export, run_under_nsys
from m3i_fast.config import TrainConfig
from m3i_fast.engine.profiling import HostWaits, NoControl, Windows, profile_steps
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.nsys import read_nsys
from m3i_fast.observe.profile_page import write_page
from m3i_fast.observe.profile_summary import Pace, read_summary, summarise
from m3i_fast.observe.stages import StageTimer
from m3i_fast.recipes import demo, shrink
from tests.engine.test_parallel import TEXT
from tests.observe.chromium import check_page, skip_reason
from tests.observe.nsys_files import write_export

WINDOWS = Windows(warmup=1, steps=2)
browser = pytest.mark.skipif(skip_reason() is not None, reason=str(skip_reason()))


def _config(dataset: Path) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    return replace(cfg, num_steps=20, num_threads=1, log_every=2)


@pytest.fixture(scope="module")
def profiled(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the shrunk demo, made by the verb."""
    folder = tmp_path_factory.mktemp("profile")
    config, out = folder / "tiny.json", folder / "out"
    _config(dataset).save(config)
    counts = ["--warmup", "1", "--steps", "2"]
    assert main(["profile", "--config", str(config), *counts, "--out", str(out)]) == 0
    return out


def test_a_real_profile_leaves_its_files(profiled: Path) -> None:
    names = {path.name for path in profiled.iterdir()}
    assert names == {
        "summary.json",
        "summary.md",
        "profile.html",
        "trace.json.gz",
        "windows.json",
        "config.json",
        "env.json",
    }
    summary = read_summary(profiled)
    assert summary["recipe"] == "tiny" and summary["profiler"] == "torch.profiler"
    assert summary["kind"] == "cpu" and summary["num_steps"] == 2
    assert (profiled / "summary.md").read_text().startswith("# Profile of tiny on ")


def test_a_real_profile_splits_the_step(profiled: Path) -> None:
    summary = read_summary(profiled)
    stages = {row["name"]: row["ms"] for row in summary["stages"]}
    assert {"data.wait", "h2d", "mix", "fwd.target", "fwd.input", "fwd.text", "bwd"} <= set(stages)
    assert {"loss.intra", "loss.inter", "loss.category", "loss.caption", "loss.total"} <= set(
        stages
    )
    assert {"comm", "clip", "optim", "ema", "log"} <= set(stages)
    named = sum(ms for name, ms in stages.items() if name != "between stages")
    assert 0.7 * summary["step_ms"] < named <= summary["step_ms"]
    assert sum(row["share"] for row in summary["families"]) == pytest.approx(1)
    assert 0 < summary["pace"]["before_ms"] and 0.5 < summary["pace"]["slowdown"]
    rows = {row["name"]: row for row in summary["kernels"]}
    assert rows["aten::addmm"]["flop_s"] > 0 and rows["m3i::boltzmann_grads"]["calls"] == 2


def test_a_real_profile_finds_the_lines_that_wait(profiled: Path) -> None:
    waits = read_summary(profiled)["waits"]
    mixing = [w for w in waits if w["name"] == "aten::nonzero" and w["stage"] == "mix"]
    assert mixing and all(
        re.match(r"m3i_fast/objectives/mixing\.py:\d+ _choose", wait["stack"][0]) for wait in mixing
    )


def test_a_second_profile_needs_another_folder(
    profiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "demo", "--out", str(profiled)]) == 2
    assert "--out" in capsys.readouterr().err


def test_more_steps_than_the_run_has_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["profile", "demo", "--num-steps", "100", "--steps", "30", "--out", str(out)]) == 2
    assert "of at most --num-steps 100, got 101" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@browser
def test_the_page_reads_well_in_a_browser(profiled: Path, tmp_path: Path) -> None:
    check_page(profiled / "profile.html", tmp_path, num_figures=0)
    path = write_export(tmp_path / "report.sqlite", "new")
    pace = Pace(before_ms=1.0, profiled_ms=2.0, after_ms=1.0)
    summary = summarise(
        read_nsys(path), recipe="<b>", profiler="nsys", device="NVIDIA H100", pace=pace
    )
    page = write_page(summary, tmp_path / "gpu.html")
    html = page.read_text()
    assert "<b>" not in html and "of communication is hidden" in html
    assert "34.0%, 0.34 ms" in html  # of what fwd.input launched
    check_page(page, tmp_path, num_figures=0)


# ---- Captures ------------------------------------------------------------------------------------


class _Control:
    """Notes what the profiler is told, and what the timer's marks are then."""

    def __init__(self, during: Callable[[], None] = lambda: None) -> None:
        self.told: list[str] = []
        self._during = during

    def start(self, timer: StageTimer) -> None:
        self.told.append("start")
        self._during()

    def stop(self, timer: StageTimer) -> None:
        self.told.append("stop")


def _profile(dataset: Path, run: Path, control: _Control | NoControl) -> tuple[Trainer, Pace]:
    trainer = Trainer(_config(dataset), run)
    try:
        pace, _ = profile_steps(trainer, control, WINDOWS)
    finally:
        trainer.close()
    return trainer, pace


def test_a_capture_is_of_the_steady_steps(dataset: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    control = _Control()
    advance = Trainer.advance

    def counted(trainer: Trainer, *arguments: Any) -> None:
        if control.told == ["start"]:
            steps.append(trainer.step)
        advance(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", counted)
        trainer, _ = _profile(dataset, tmp_path / "run", control)
    assert control.told == ["start", "stop"]
    assert steps == [3, 4] and trainer.step == WINDOWS.total


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where these tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), SystemExit),
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt),
        (lambda: exec("raise RuntimeError('in a step')"), RuntimeError),
    ],
)
def test_a_capture_is_closed_whatever_ends_it(
    act: Callable[[], None],
    error: type[BaseException],
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = _Control()
    advance = Trainer.advance

    def struck(trainer: Trainer, *arguments: Any) -> None:
        if control.told == ["start"]:
            act()
        advance(trainer, *arguments)

    monkeypatch.setattr(Trainer, "advance", struck)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) as raised:
        _profile(dataset, tmp_path / "run", control)
    assert control.told == ["start", "stop"]
    assert signal.getsignal(signal.SIGTERM) is before
    if error is SystemExit:
        assert raised.value.args == (128 + signal.SIGTERM,)


def test_profiling_changes_no_weights(dataset: Path, tmp_path: Path) -> None:
    """Bit for bit those of a plain run of as many steps."""
    trainer, _ = _profile(dataset, tmp_path / "profiled", NoControl())
    plain = Trainer(_config(dataset), tmp_path / "plain")
    plain.log.open(0)
    for _ in range(WINDOWS.total):
        plain.advance()
    plain.close()
    theirs = plain.objective.state_dict()
    different = [
        name
        for name, value in trainer.objective.state_dict().items()
        if not torch.equal(value, theirs[name])
    ]
    assert theirs and not different


def test_reads_of_a_tensor_are_noted_with_their_stage() -> None:
    looker = HostWaits(lambda: "optim")
    values = torch.arange(4.0)
    with looker:
        assert float(values.sum()) == 6 and len(values.nonzero()) == 3
        (values + 1).relu()
    found = [(wait.name, wait.stage, wait.calls) for wait in looker.found()]
    assert found == [("aten::_local_scalar_dense", "optim", 1), ("aten::nonzero", "optim", 1)]


@pytest.mark.parametrize("name", ["warmup", "steps"])
def test_windows_have_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: expected at least 1, got 0"):
        Windows(**{"warmup": 1, "steps": 1, name: 0})


# ---- nsys ----------------------------------------------------------------------------------------

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
    report = run_under_nsys(["profile", "demo", "--inside-nsys"], tmp_path)
    assert len(read_nsys(export(report)).steps) == 2
    profile, exported = map(json.loads, nsys.read_text().splitlines())
    assert profile[0] == "profile" and "--capture-range=cudaProfilerApi" in profile
    assert "--capture-range-end=stop" in profile
    assert profile[-5:] == ["-m", "m3i_fast.cli", "profile", "demo", "--inside-nsys"]
    assert exported[:2] == ["export", "--type=sqlite"] and exported[-1] == str(report)


@pytest.mark.parametrize("verb", ["profile", "export"])
def test_a_failure_of_nsys_is_an_error(
    verb: str, nsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSYS_FAILS", verb)
    with pytest.raises(RuntimeError, match=f"nsys {verb} ended with 1"):
        export(run_under_nsys(["profile", "demo"], tmp_path))


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
        run_under_nsys(["profile", "demo"], tmp_path)
    assert [json.loads(line) for line in nsys.read_text().splitlines()][1:] == ["ended"]


def test_inside_nsys_the_capture_is_cudas(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in ("start", "stop"):
        monkeypatch.setattr(torch.cuda.profiler, name, partial(told.append, name))
    config, out = tmp_path / "tiny.json", tmp_path / "out"
    _config(dataset).save(config)
    out.mkdir()
    counts = ["--warmup", "1", "--steps", "1"]
    arguments = ["profile", "--config", str(config), *counts, "--out", str(out), "--inside-nsys"]
    assert main(arguments) == 0
    assert told == ["start", "stop"] and [path.name for path in out.iterdir()] == ["windows.json"]


def test_a_recording_of_nsys_becomes_a_summary(
    nsys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what nsys and the program under it leave."""
    pace = {"before_ms": 1.0, "profiled_ms": 1.0, "after_ms": 1.0}
    wait = {"name": "aten::nonzero", "stage": "mix", "stack": ["a.py:1 f"], "calls": 2}
    (tmp_path / "windows.json").write_text(json.dumps({"pace": pace, "waits": [wait]}))
    name, command = parse(["demo", "--out", str(tmp_path)])
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    recording = record(command, "nsys", device, ["demo", "--out", str(tmp_path)])
    write_summary(name, command, recording, "nsys", device)
    summary = read_summary(tmp_path)
    assert summary["profiler"] == "nsys" and summary["peak"]["name"] == "h100"
    assert summary["step_ms"] == pytest.approx(1.0) and summary["waits"] == [wait]
    assert "| aten::nonzero | mix | 2 | a.py:1 f |" in (tmp_path / "summary.md").read_text()


def test_nsys_is_chosen_where_there_is_a_gpu_and_nsys(
    nsys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_profiler("auto", gpu) == "nsys" and choose_profiler("nsys", gpu) == "nsys"
    assert choose_profiler("torch", gpu) == "torch" and choose_profiler("auto", cpu) == "torch"
    with pytest.raises(ValueError, match="--profiler: expected torch or auto, got nsys: device"):
        choose_profiler("nsys", cpu)
    monkeypatch.setenv("PATH", "")
    assert choose_profiler("auto", gpu) == "torch"
    with pytest.raises(ValueError, match="got nsys: it is not on PATH"):
        choose_profiler("nsys", gpu)


def test_peaks_are_of_known_cards() -> None:
    peak = peak_of("NVIDIA H100 80GB HBM3")
    assert peak is not None and peak.name == "h100" and peak.flop_s == 989e12
    assert peak_of("NVIDIA GeForce RTX 3090") is None


# ---- Differences ---------------------------------------------------------------------------------


def test_a_slowdown_is_told_with_its_stage_and_kernel(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real profile against itself with twice the calls of one operator, one gone, one new."""
    slower = read_summary(profiled)
    rows = {row["name"]: row for row in slower["kernels"]}
    product = rows["aten::addmm"]
    added = 10 * product["ms"]
    product["ms"], product["calls"] = product["ms"] + added, 11 * product["calls"]
    rows["aten::mm"]["name"] = "aten::mm_of_another_build"
    (stage,) = [row for row in slower["stages"] if row["name"] == "fwd.input"]
    stage["ms"] += added
    slower["step_ms"] += added
    (tmp_path / "summary.json").write_text(json.dumps(slower))
    assert main(["profile", "diff", str(profiled), str(tmp_path)]) == 0
    told = capsys.readouterr().out
    stages, kernels = told.split("## Kernels or operators")
    first = [line for line in kernels.splitlines() if line.startswith("| aten")][0]
    assert first.startswith("| aten::addmm |") and first.endswith("| more calls |")
    assert f"{added:+.3f} ms" in stages and f"| {added:+.3f} |" in stages
    assert re.search(r"aten::mm_of_another_build .* new \|", kernels)
    assert re.search(r"\| aten::mm \|.* gone \|", kernels)


def test_what_cannot_be_compared_is_refused(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    for content, message in [
        (json.dumps(read_summary(profiled) | {"kind": "cuda"}), "one kind of device"),
        (json.dumps({"schema": 99}), "expected a summary of schema 1, got 99"),
        ("{", "not a whole summary"),
    ]:
        other.write_text(content)
        assert main(["profile", "diff", str(profiled), str(other)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main(["profile", "diff", str(profiled), str(tmp_path / "absent")]) == 2
    assert main(["profile", "diff", str(profiled)]) == 2
