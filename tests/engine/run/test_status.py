"""How far a run is, as its directory says."""

import os
from pathlib import Path

import pytest

from m3i_fast.engine.run.lock import RunLock
from m3i_fast.engine.run.status import RunStatus, is_locked, status_of


def _status(run: Path, logged: int, saved: int | None) -> RunStatus:
    return status_of(run, num_steps=100, logged_step=logged, saved_step=saved)


def test_a_run_that_goes_on_is_told_from_one_that_ended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    lock = RunLock(tmp_path)
    lock.acquire()
    before = (tmp_path / "run.lock").read_bytes()
    assert _status(tmp_path, 60, 50).state == "training"
    assert (tmp_path / "run.lock").read_bytes() == before
    lock.release()
    ended = _status(tmp_path, 60, 50)
    assert (ended.state, ended.step, ended.saved_step) == ("ended", 60, 50)
    assert "step 60 of 100" in ended.sentences[0] and "checkpoint 50" in ended.sentences[0]
    lock.acquire()  # nobody holds it
    lock.release()


def test_a_complete_run_and_one_without_a_checkpoint(tmp_path: Path) -> None:
    assert _status(tmp_path, 90, 100).sentences == ["The run is complete, 100 steps."]
    none = _status(tmp_path, 0, None)
    assert none.state == "ended" and "no checkpoint" in none.sentences[0]


def test_what_a_failed_run_left_is_named(tmp_path: Path) -> None:
    (tmp_path / "stacks-rank1.txt").write_text("stack")
    (tmp_path / "dump_step_00000040").mkdir()
    assert _status(tmp_path, 40, 30).sentences[1] == (
        "It left dump_step_00000040, stacks-rank1.txt, which say what went wrong."
    )


@pytest.mark.parametrize("kind", ["absent", "folder", "link"])
def test_a_lock_that_is_no_file_locks_nothing(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "run.lock").mkdir()
    elif kind == "link":
        os.symlink("/dev/null", tmp_path / "run.lock")
    assert not is_locked(tmp_path)
