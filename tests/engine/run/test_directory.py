"""A run's directory: it has to stay, and one process at a time trains in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from m3i_fast.benchmarks.faults.failing_files import FaultyFiles, in_child
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.engine.run.directory import Run
from m3i_fast.engine.run.lock import RunLock
from m3i_fast.engine.train_step import TrainStep
from m3i_fast.pipelines.batch import Batch
from tests.shared.engine.small_run import small_run

# ---- A directory that goes away ------------------------------------------------------------------


def _replaced(path: Path) -> None:
    """Moved aside, and another run begins in its place."""
    path.rename(path.with_name("moved"))
    other = Run(path, TrainConfig())
    other.begin()
    other.close()


@pytest.mark.parametrize("step", [1, 2])  # before a row of metrics, before a checkpoint
@pytest.mark.parametrize(
    "go", [shutil.rmtree, lambda path: path.rename(path.with_name("moved")), _replaced]
)
def test_a_run_whose_directory_goes_away_fails_in_a_line(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    go: Callable[[Path], object],
    step: int,
) -> None:
    out, take, last = tmp_path / "run", TrainStep.__call__, 0

    def going(self: TrainStep, batch: Batch, *, monitor: bool = False) -> dict[str, Tensor]:
        nonlocal last
        last = self.steps_taken
        if last == step:
            go(out)
        return take(self, batch, monitor=monitor)

    monkeypatch.setattr(TrainStep, "__call__", going)
    cfg = small_run(dataset, num_steps=20, log_every=2, checkpoint_every=3)
    cfg.save(tmp_path / "cfg.json")
    assert main(["train", "--config", str(tmp_path / "cfg.json"), "--out", str(out)]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("error") == 1
    reason = "the run's directory was deleted, moved or replaced while it trained"
    assert f"error: {out}: {reason}\n" in said and last == step
    assert not (out / "checkpoints").exists() and not list(tmp_path.glob("**/checkpoints/*"))


def test_what_is_missing_later_is_no_wrong_request(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here skipped.jsonl, whose place is taken by a link that leads nowhere."""
    cfg = small_run(dataset, num_steps=20, log_every=2)
    cfg = replace(cfg, optim=replace(cfg.optim, lr=1e30))
    cfg.save(tmp_path / "cfg.json")
    out = tmp_path / "run"
    out.mkdir()
    (out / "skipped.jsonl").symlink_to(tmp_path / "absent" / "skipped.jsonl")
    assert main(["train", "--config", str(tmp_path / "cfg.json"), "--out", str(out)]) == 1
    assert "skipped.jsonl" in capsys.readouterr().err


# ---- One run a directory -------------------------------------------------------------------------


def _link(path: Path) -> None:
    path.symlink_to(path.parents[1] / "precious")


def _second_name(path: Path) -> None:
    path.hardlink_to(path.parents[1] / "precious")


@pytest.mark.parametrize(
    ("plant", "got"),
    [
        (_link, "a symbolic link"),
        (lambda path: path.symlink_to(path.parent / "absent"), "a symbolic link"),
        (lambda path: path.symlink_to("/dev/zero"), "a symbolic link"),
        (_second_name, "a file with 2 names"),
        (os.mkfifo, "a fifo"),
        (Path.mkdir, "a directory"),
    ],
)
def test_what_stands_for_the_lock_is_refused_and_left_alone(
    tmp_path: Path, plant: Callable[[Path], object], got: str
) -> None:
    precious, path = tmp_path / "precious", tmp_path / "run" / "run.lock"
    precious.write_text("years of work")
    path.parent.mkdir()
    plant(path)
    before = os.lstat(path)
    refusal = re.escape(f"{path}: expected a file of this run alone, got {got}: remove it")
    with pytest.raises(FileExistsError, match=refusal):
        RunLock(path.parent).acquire()
    assert precious.read_text() == "years of work" and not (path.parent / "absent").exists()
    assert (os.lstat(path).st_mode, os.lstat(path).st_ino) == (before.st_mode, before.st_ino)


def test_a_lock_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        FaultyFiles(tmp_path, fail_at=0, error=errno.EACCES, kinds=("open",)),
        pytest.raises(PermissionError, match="run.lock"),
    ):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("text", [b"", b"[" * 4096, b"[]", b'{"pid": [], "host": 1}', b"\xff"])
def test_a_lock_of_an_unreadable_text_is_anothers(tmp_path: Path, text: bytes) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    (tmp_path / "run.lock").write_bytes(text)
    with pytest.raises(FileExistsError, match="another process is training in it"):
        RunLock(tmp_path).acquire()
    first.release()


def test_a_second_run_is_refused_with_who_holds_it(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.acquire()
    who = rf"process {os.getpid()} on {socket.gethostname()}, since 20.* is training in it"
    with pytest.raises(FileExistsError, match=who):
        RunLock(tmp_path).acquire()

    def try_from_another_process() -> None:
        with pytest.raises(FileExistsError, match=who):
            RunLock(tmp_path).acquire()

    assert in_child(try_from_another_process) == 0
    first.release()
    RunLock(tmp_path).acquire()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    def die() -> None:
        lock = RunLock(tmp_path)
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die) == -signal.SIGKILL
    left = json.loads((tmp_path / "run.lock").read_text())
    assert left["pid"] != os.getpid()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_of_two_new_runs_in_a_directory_one_begins(tmp_path: Path) -> None:
    cfg = TrainConfig()
    first, second = Run(tmp_path / "run", cfg), Run(tmp_path / "run", replace(cfg, seed=1))
    first.expect_new(), second.expect_new()
    first.begin()
    with pytest.raises(FileExistsError, match="is training in it"):
        second.begin()
    with pytest.raises(FileExistsError, match="is training in it"):
        second.resume()
    first.close()
    for begin in (second.begin, second.expect_new):
        with pytest.raises(FileExistsError, match="before its first checkpoint: add --auto-resume"):
            begin()
    second.close()
    with pytest.raises(FileNotFoundError, match="before its first checkpoint: add --auto-resume"):
        Run(tmp_path / "run", cfg).resume()
    assert TrainConfig.load(tmp_path / "run" / "config.json") == cfg


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).acquire()
    assert "has no locks" in caplog.text
