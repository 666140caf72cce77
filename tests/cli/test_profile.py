"""m3i-fast profile: a real profile of a CPU, captures that close, differences."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.stages import StageTimer
from m3i_fast.profiling.capture import HostWaitRecorder, NoProfiler, Windows, profile_steps
from m3i_fast.profiling.nsys.export import read_nsys
from m3i_fast.profiling.summary import Pace, read_summary, summarise
from m3i_fast.profiling.summary_page import write_page
from m3i_fast.recipes import demo, shrink
from tests.shared.chromium import check_page, skip_reason
from tests.shared.engine.small_run import TEXT
from tests.shared.nsys_files import write_export

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
    pace = summary["pace"]
    unprofiled = (pace["before_ms"] + pace["after_ms"]) / 2
    assert 0 < unprofiled and pace["slowdown"] == pytest.approx(pace["profiled_ms"] / unprofiled)
    rows = {row["name"]: row for row in summary["kernels"]}
    assert rows["aten::addmm"]["flop_s"] > 0
    # Of captions; categories are over columns alone.
    assert rows["m3i::boltzmann_grads"]["calls"] == rows["m3i::boltzmann_rows_pass"]["calls"] == 1


@pytest.mark.parametrize(("log_every", "taken"), [(2, 2), (1, 1), (3, 20)])
def test_windows_have_logged_steps_alike_and_nothing_is_sent(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, taken: int
) -> None:
    """A logged step costs its monitors; the rows of a profile are of no run that is watched."""
    cfgs: list[TrainConfig] = []

    def note(trainer: Trainer, *_: object) -> None:
        cfgs.append(trainer.cfg)
        raise SystemExit(3)

    monkeypatch.setattr("m3i_fast.profiling.profile_run.profile_steps", note)
    cfg = replace(
        _config(dataset),
        log_every=log_every,
        evaluate_every=2,
        telemetry=TelemetryConfig(mlflow_uri=f"file://{tmp_path}/store", prometheus_port=9400),
    )
    cfg.save(tmp_path / "tiny.json")
    counts = ["--warmup", "1", "--steps", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["profile", "--config", str(tmp_path / "tiny.json"), *counts])
    (of_profile,) = cfgs
    assert (of_profile.log_every, of_profile.evaluate_every) == (taken, 0)
    assert of_profile.telemetry == TelemetryConfig(hz=0)


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


@pytest.mark.pages
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


def _profile(dataset: Path, run: Path, control: _Control | NoProfiler) -> tuple[Trainer, Pace]:
    trainer = Trainer(_config(dataset), run)
    try:
        measured = profile_steps(trainer, control, WINDOWS)
    finally:
        trainer.close()
    return trainer, measured.pace


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
    trainer, _ = _profile(dataset, tmp_path / "profiled", NoProfiler())
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
    recorder = HostWaitRecorder(lambda: "optim")
    values = torch.arange(4.0)
    with recorder:
        assert float(values.sum()) == 6 and len(values.nonzero()) == 3
        (values + 1).relu()
    found = [(wait.name, wait.stage, wait.calls) for wait in recorder.waits()]
    assert found == [("aten::_local_scalar_dense", "optim", 1), ("aten::nonzero", "optim", 1)]


@pytest.mark.parametrize("name", ["warmup", "steps"])
def test_windows_have_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: expected at least 1, got 0"):
        Windows(**{"warmup": 1, "steps": 1, name: 0})


# ---- Differences ---------------------------------------------------------------------------------


def test_a_slowdown_is_told_with_its_stage_and_kernel(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real profile against itself: one operator called more than all others, one gone, one new.

    What others took is a matter of what ran beside the profile.
    """
    slower = read_summary(profiled)
    rows = {row["name"]: row for row in slower["kernels"]}
    product = rows["aten::addmm"]
    times = math.ceil(2 * max(row["ms"] for row in rows.values()) / product["ms"])
    added = times * product["ms"]
    product["ms"], product["calls"] = product["ms"] + added, (times + 1) * product["calls"]
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
        ("{", "damaged: "),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(read_summary(profiled) | {"kernels": [1]}), "kernels[0]: expected an object"),
    ]:
        other.write_text(content)
        assert main(["profile", "diff", str(profiled), str(other)]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main(["profile", "diff", str(profiled), str(tmp_path / "absent")]) == 2
    assert main(["profile", "diff", str(profiled)]) == 2
