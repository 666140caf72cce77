"""Saving in the background: what a step waits for, and errors that are not lost."""

import errno
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from m3i_fast.benchmarks.faults.failing_files import FaultyFiles
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint import saver
from m3i_fast.engine.checkpoint.saver import Saver
from tests.shared.engine.checkpoint_cases import (
    assert_equal,
    loaded,
    save,
    train,
    trained,
    weights,
)


class Gate:
    """Holds the writing of shards until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        write_shards = saver.write_shards

        def wait(*arguments: object, **options: object) -> None:
            self.begun.set()
            assert self.open.wait(30)
            write_shards(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(saver, "write_shards", wait)


def test_a_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is trained on meanwhile is not in the checkpoint."""
    gate = Gate(monkeypatch)
    model, optimizer = trained(1)
    expected = weights(model, optimizer)
    background = Saver(tmp_path, keep=2, background=True)
    background.save(step=3, model=model, optimizer=optimizer, state={})
    assert gate.begun.wait(30)
    train(model, optimizer, 5)
    assert checkpoint.checkpoints(tmp_path) == [] and not (tmp_path / "latest").exists()
    gate.open.set()
    background.close()
    assert_equal(loaded(checkpoint.latest(tmp_path)), expected)


def test_one_save_is_in_flight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    model, optimizer = trained(1)
    background = Saver(tmp_path, keep=2, background=True)
    background.save(step=1, model=model, optimizer=optimizer, state={})
    second = threading.Thread(
        target=background.save,
        kwargs={"step": 2, "model": model, "optimizer": optimizer, "state": {}},
    )
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gate.open.set()
    second.join(30)
    background.close()
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [1, 2]


@pytest.mark.parametrize("end", ["save", "wait", "close"])
def test_an_error_in_the_background_surfaces(
    tmp_path: Path, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    model, optimizer = trained(2)
    background = Saver(tmp_path, keep=2, background=True)

    def begin(step: int) -> None:
        background.save(step=step, model=model, optimizer=optimizer, state={})

    with FaultyFiles(tmp_path, fail_at=9):
        begin(2)
        assert background._thread is not None
        background._thread.join()
    assert "step 2: no checkpoint written" in caplog.text
    with pytest.raises(OSError, match="No space") as error:
        begin(3) if end == "save" else getattr(background, end)()
    assert error.value.errno == errno.ENOSPC
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [1]
    begin(2)  # it is told once, and the step is not taken for saved
    background.close()
    assert checkpoint.latest(tmp_path).step == 2


def test_the_exit_of_a_process_waits_for_its_save(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from m3i_fast.engine.checkpoint import saver\n"
        "from tests.shared.engine.checkpoint_cases import trained\n"
        "write = saver.write_shards\n"
        "saver.write_shards = lambda *a, **o: (time.sleep(0.5), write(*a, **o))\n"
        "model, optimizer = trained(1)\n"
        f"background = saver.Saver(Path({str(tmp_path)!r}), keep=1, background=True)\n"
        "background.save(step=1, model=model, optimizer=optimizer, state={})\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7
    assert checkpoint.latest(tmp_path).step == 1


def test_what_cannot_be_deleted_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    with (
        FaultyFiles(tmp_path, fail_at=0, error=errno.EPERM, kinds=("rmdir",)),
        caplog.at_level(logging.WARNING),
    ):
        save(tmp_path, 3)
    assert "could not delete" in caplog.text and "step_00000001" in caplog.text
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [2, 3]
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000004",
    ]
