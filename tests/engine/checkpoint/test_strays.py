"""A checkpoint's directory holds what its manifest names: all else is refused, and never opened."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m3i_fast.cli import main
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint
from tests.engine.checkpoint.test_checkpoints import MODEL, OLD, OPTIMIZER, STATE
from tests.shared.engine.checkpoint_cases import assert_equal, loaded, save, trained, weights


def _other_weights(path: Path) -> None:
    """As large as the model's own, and zero: torch's reader would take the last it finds."""
    own = load_file(path.parents[1] / MODEL)
    save_file({name: torch.zeros_like(tensor) for name, tensor in own.items()}, path)


def _link(path: Path) -> None:
    """Its own content, at another place."""
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def _socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mknod(path, stat.S_IFSOCK | 0o600)  # as bind() leaves it, whose names end at 107 bytes


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "00001-of-00001.safetensors").touch()


def _linked_folder(path: Path) -> None:
    """To what holds more than is looked at here."""
    path.rename(path.parents[1] / "elsewhere")
    (path.parents[1] / "elsewhere" / "more").touch()
    path.symlink_to(path.parents[1] / "elsewhere", target_is_directory=True)


STRAYS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights with a dot": ("model/.x.safetensors", _other_weights, "nothing, got a file"),
    "weights": ("model/x.safetensors", _other_weights, "nothing, got a file"),
    "empty, with a dot": ("model/.x.safetensors", Path.touch, "nothing, got a file"),
    "metadata": (".metadata", Path.touch, "nothing, got a file"),
    "state": ("state/00000-of-00001.json", lambda p: p.write_text("{}"), "nothing, got a file"),
    "layout of before": ("model.safetensors", Path.touch, "nothing, got a file"),
    "fifo": ("model/.x.safetensors", _fifo, "nothing, got a fifo"),
    "fifo for optimizer": (OPTIMIZER, _fifo, "a file, got a fifo"),
    "fifo for state": (STATE, _fifo, "a file, got a fifo"),
    "fifo for the manifest": ("manifest.json", _fifo, "a file, got a fifo"),
    "socket": ("state/.x.json", _socket, "nothing, got a socket"),
    "link": (MODEL, _link, "a file, got a symbolic link"),
    "link to the device zero": (
        "x",
        lambda p: p.symlink_to("/dev/zero"),
        "nothing, got a symbolic link",
    ),
    "folder": ("model/more", _folder, "nothing, got a directory"),
    "folder with a dot": (".more", _folder, "nothing, got a directory"),
    "link for a folder": ("model", _linked_folder, "a directory, got a symbolic link"),
    "a name of many lines": ("model/a\nb", Path.touch, "nothing, got a file"),
}


@pytest.mark.parametrize("name", STRAYS)
def test_strays_are_refused_by_all_that_reads(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plant, reason = STRAYS[name]
    for step in (1, 2):
        save(tmp_path, step)
    newest = Checkpoint(tmp_path / "step_00000002")
    plant(newest.path / file)
    with pytest.raises(ValueError) as found:
        newest.verify()
    shown = repr(file) if "\n" in file else file
    said = str(found.value).removeprefix(str(newest.path))
    assert said in (f": {shown}: expected {reason}", f"/{shown}: expected {reason}")
    model, optimizer = trained(3)
    before = weights(model, optimizer)
    for read in (
        lambda: newest.load_model(model),
        lambda: newest.load_optimizer(model, optimizer),
        newest.state,
    ):
        with pytest.raises(ValueError) as refused:
            read()
        assert str(refused.value) == str(found.value)
    assert_equal(weights(model, optimizer), before)
    out = str(tmp_path / "out.safetensors")
    assert main(["checkpoint", "verify", str(newest.path)]) == 1
    assert main(["checkpoint", "consolidate", str(newest.path), out]) == 2
    assert shown in capsys.readouterr().err and not Path(out).exists()
    with caplog.at_level(logging.WARNING):
        used = checkpoint.latest(tmp_path)
    assert used.step == 1 and shown in caplog.text
    assert_equal(loaded(used), weights(*trained(1)))


@pytest.mark.parametrize(
    ("file", "plant"), [(".x.safetensors", Path.touch), ("model", Path.mkdir), ("x", _fifo)]
)
def test_strays_of_the_layout_without_a_manifest_are_refused(
    tmp_path: Path, file: str, plant: Callable[[Path], object]
) -> None:
    path = tmp_path / OLD.name
    shutil.copytree(OLD, path)
    plant(path / file)
    assert f"{path}: {file}: expected nothing, got" in str(Checkpoint(path).damage())


@pytest.mark.parametrize("plant", [_fifo, lambda p: p.symlink_to(p.parents[1]), Path.mkdir])
def test_a_save_goes_past_what_is_planted_in_its_way(
    tmp_path: Path, plant: Callable[[Path], object]
) -> None:
    """In the names that a save writes under before it has its own."""
    for name in (".step_00000003.tmp", ".step_00000001.deleted", "step_00000003"):
        directory = tmp_path / "run" / name.strip(".")
        for step in (1, 2):
            save(directory, step)
        plant(directory / name)
        save(directory, 3)
        left = {path.name for path in directory.iterdir()}
        assert left == {"latest", "step_00000002", "step_00000003"}
        assert not (directory / "step_00000003").is_symlink()
        assert_equal(loaded(checkpoint.latest(directory)), weights(*trained(3)))


def test_a_whole_model_is_not_written_into_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = save(tmp_path, 1)
    out = saved.path / "whole.safetensors"
    assert main(["checkpoint", "consolidate", str(tmp_path), str(out)]) == 2
    assert "OUT: expected a file outside" in capsys.readouterr().err
    assert not out.exists() and saved.damage() is None
