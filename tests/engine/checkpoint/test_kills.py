"""A save that is killed, loses power or finds no space, at each of its writes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m3i_fast.benchmarks.faults.failing_files import (
    NAMES,
    TAKES_SPACE,
    FaultyFiles,
    flip_byte,
    in_child,
    killed_at,
)
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.saver import Saver
from tests.shared.engine.checkpoint_cases import assert_equal, loaded, save, trained, weights

EXPECTED = {step: weights(*trained(step)) for step in (1, 2, 3)}
SAVED = ["latest", "step_00000002", "step_00000003"]


@pytest.fixture
def before() -> Iterator[Path]:
    """Checkpoints of steps 1 and 2; in memory, where a sync costs nothing and is counted still."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for step in (1, 2):
            save(Path(folder) / "before", step)
        yield Path(folder) / "before"


def _third(directory: Path, *, background: bool) -> Callable[[], None]:
    """A save of step 3, which deletes step 1; training before it is done here and now."""
    model, optimizer = trained(3)

    def run() -> None:
        with Saver(directory, keep=2, background=background) as saver:
            saver.save(step=3, model=model, optimizer=optimizer, state={"at": 3})

    return run


def _each_kill(before: Path, *, background: bool = False, **options: bool) -> Iterator[Path]:
    """A copy of `before` for every operation of the save, killed there."""
    number, killed = 0, True
    while killed:
        directory = before.with_name(f"killed-{number}")
        shutil.copytree(before, directory)
        killed = killed_at(_third(directory, background=background), directory, number, **options)
        yield directory
        shutil.rmtree(directory)
        number += 1
    assert number > 30


def _check(directory: Path, *, damaged: int = 0) -> int:
    """Which step a resume goes on from."""
    found = checkpoint.checkpoints(directory)
    bad = [c for c in found if c.damage() is not None]
    assert len(bad) <= damaged and len(found) - len(bad) >= 2
    newest = checkpoint.latest(directory)
    assert_equal(loaded(newest), EXPECTED[newest.step])
    assert newest.state() == {"at": newest.step}
    named = (directory / "latest").read_text().strip()
    assert (directory / named).is_dir()
    _third(directory, background=False)()
    assert sorted(path.name for path in directory.iterdir()) == SAVED
    assert all(c.damage() is None for c in checkpoint.checkpoints(directory))
    assert_equal(loaded(checkpoint.latest(directory)), EXPECTED[3])
    return newest.step


SLOW = pytest.mark.distributed


@pytest.mark.parametrize(
    ("options", "background"),
    [
        ({"torn": True}, True),
        pytest.param({"torn": True}, False, marks=SLOW),
        ({"power_cut": True}, False),
        pytest.param({"power_cut": True}, True, marks=SLOW),
        pytest.param({}, False, marks=SLOW),
    ],
    ids=str,
)
def test_a_save_killed_at_any_write_leaves_good_checkpoints(
    before: Path, options: dict[str, bool], background: bool
) -> None:
    steps = [_check(d) for d in _each_kill(before, background=background, **options)]
    assert steps == sorted(steps) and {2, 3} == set(steps)


@pytest.mark.parametrize(
    "options", [{"power_cut": True}, pytest.param({"torn": True}, marks=SLOW)], ids=str
)
def test_a_damaged_one_is_replaced_and_a_kill_there_leaves_good_ones(
    before: Path, options: dict[str, bool]
) -> None:
    """Step 3 was there, damaged, so the run was resumed at step 2 and comes to step 3 again."""
    flip_byte(save(before, 3, keep=3).path / "model" / "00001-of-00001.safetensors")
    steps = [_check(d, damaged=1) for d in _each_kill(before, **options)]
    assert steps == sorted(steps) and {2, 3} == set(steps)


@pytest.mark.parametrize("background", [False, True])
def test_no_space_at_any_write_is_raised_and_leaves_good_checkpoints(
    before: Path, background: bool
) -> None:
    directory = before.with_name("counted")
    shutil.copytree(before, directory)
    with FaultyFiles(directory) as files:
        _third(directory, background=background)()
    for number in range(len(files.operations)):
        directory = before.with_name(f"full-{number}")
        shutil.copytree(before, directory)
        with FaultyFiles(directory, fail_at=number) as full:
            failed = False
            try:
                _third(directory, background=background)()
            except OSError as error:
                failed = error.errno == errno.ENOSPC
        assert failed == any(o.kind in TAKES_SPACE for o in full.operations[number:])
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
        _check(directory)
        shutil.rmtree(directory)


def test_a_read_only_directory_is_said(before: Path) -> None:
    with (
        FaultyFiles(before, fail_at=0, error=errno.EROFS, kinds=NAMES),
        pytest.raises(OSError, match="Read-only file system"),
    ):
        _third(before, background=False)()
    assert _check(before) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_full_leaves_the_old_checkpoints(before: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        directory = disk / "checkpoints"
        shutil.copytree(before, directory)
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
        os.truncate(ballast, ballast.stat().st_size - 8192)
        with pytest.raises(OSError, match="No space"):
            _third(directory, background=False)()
        assert [c.step for c in checkpoint.checkpoints(directory)] == [1, 2]
        ballast.unlink()
        assert _check(directory) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_layer_sees_every_change(before: Path) -> None:
    """What is not counted is not tested: all operations together explain what is there."""
    directory = before.with_name("seen")
    with FaultyFiles(directory) as files:
        _third(directory, background=False)()
    kinds = {o.kind for o in files.operations}
    assert {"mkdir", "open", "write", "fsync", "rename", "replace"} <= kinds
    opened = {o.path.rpartition("/")[2] for o in files.operations if o.kind == "open"}
    there = {p.name for p in directory.rglob("*") if p.is_file()}
    assert there - opened == {"latest"}  # replaced by a temporary one
    assert in_child(lambda: None) == 0
