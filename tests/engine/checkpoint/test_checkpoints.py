"""Checkpoints: exact, readable by others, and passed over or refused when damaged."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from safetensors.torch import save as st_save
from torch import nn

from m3i_fast.benchmarks.faults.failing_files import flip_byte, forge, truncate
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.optim.optimizers import Optimizers, build_optimizer
from tests.shared.engine.checkpoint_cases import (
    assert_equal,
    loaded,
    make_model,
    save,
    train,
    trained,
    weights,
)

OLD = Path(__file__).parent / "old_checkpoint" / "step_00000004"
MODEL, OPTIMIZER = ("model/00001-of-00001.safetensors", "optimizer/00001-of-00001.safetensors")
STATE = "state/00001-of-00001.json"
DEEP = b"[" * 100_000


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_loaded_checkpoint_continues_bit_for_bit(
    tmp_path: Path, matrices: Literal["adamw", "muon"], background: bool
) -> None:
    cfg = OptimConfig(lr=1e-2, matrices=matrices)
    model, optimizer = trained(0, cfg=cfg)
    with Saver(tmp_path, keep=1, background=background) as saver:
        saver.save(step=3, model=model, optimizer=optimizer, state={"loader": {"x": 1}})
        train(model, optimizer, 4)  # while it is written
    saved = checkpoint.latest(tmp_path)
    other, other_optimizer = trained(1, cfg=cfg)
    saved.load_model(other)
    saved.load_optimizer(other, other_optimizer)
    assert saved.step == 3 and saved.state() == {"loader": {"x": 1}}
    train(other, other_optimizer, 4)
    assert_equal(weights(other, other_optimizer), weights(model, optimizer))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_files_are_read_by_safetensors_and_by_torch(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    path = save(tmp_path, 3).path
    assert_equal(load_file(path / MODEL), model.state_dict())
    read = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(path / "model")), no_dist=True)
    assert_equal(read, model.state_dict())
    moments = load_file(path / OPTIMIZER)
    assert_equal({**read, **moments}, weights(model, optimizer))
    assert not list(path.rglob("*.pt")) and not list(path.rglob(".metadata"))


def test_only_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 12, 20, 21, 22):
        save(tmp_path, step, keep=2, keep_every=10)
        assert (tmp_path / "latest").read_text() == f"step_{step:08d}\n"
    (tmp_path / ".step_00000099.tmp").mkdir()
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [10, 20, 21, 22]
    assert checkpoint.latest(tmp_path).step == 22
    with pytest.raises(ValueError, match="keep_every: expected >= 0"):
        _config(keep_every=-1)


def _config(**options: int) -> None:
    from m3i_fast.config import TrainConfig

    TrainConfig(**options)  # type: ignore[arg-type]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    with Saver(tmp_path, keep=2) as saver:
        for state in ({"a": 1}, {"a": 2}):
            saver.save(step=3, model=model, optimizer=optimizer, state=state)
    with Saver(tmp_path, keep=2) as saver:
        saver.save(step=3, model=model, optimizer=optimizer, state={"a": 3})
    assert checkpoint.latest(tmp_path).state() == {"a": 1}


def test_nothing_to_load_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.latest(tmp_path / "absent")


@pytest.mark.parametrize("num_steps", [0, 3])
def test_parameters_without_a_gradient_yet_have_no_moments(tmp_path: Path, num_steps: int) -> None:
    """Before the first step, and those of a term that no sample has asked for yet."""

    def make(seed: int, num_steps: int) -> tuple[nn.Module, Optimizers]:
        model = make_model(seed)
        model.register_parameter("unused", nn.Parameter(torch.randn(2)))
        optimizer = build_optimizer(OptimConfig(lr=1e-2), model)
        train(model, optimizer, num_steps)
        return model, optimizer

    model, optimizer = make(0, num_steps)
    with Saver(tmp_path, keep=1, background=True) as saver:
        saver.save(step=num_steps, model=model, optimizer=optimizer, state={})
    other, other_optimizer = make(1, 0)
    saved = checkpoint.latest(tmp_path)
    saved.load_model(other)
    saved.load_optimizer(other, other_optimizer)
    assert_equal(weights(other, other_optimizer), weights(model, optimizer))
    for m, o in ((model, optimizer), (other, other_optimizer)):
        train(m, o, 2)
    assert_equal(weights(other, other_optimizer), weights(model, optimizer))


# ---- Damage --------------------------------------------------------------------------------------


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, **changes}))

    return edit


def _forge(content: bytes) -> Callable[[Path], None]:
    """The manifest is made to agree."""
    return lambda path: forge(path.parents[1], str(path.relative_to(path.parents[1])), content)


def _part_header(parts: str) -> bytes:
    """A file of one tensor that is said to be a part of another."""
    return st_save({"0.bias": torch.zeros(7)}, metadata={"DCP_SHARDING_INFO": parts})


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "model missing": (MODEL, Path.unlink, "model/.*missing"),
    "optimizer missing": (OPTIMIZER, Path.unlink, "optimizer/.*missing"),
    "state missing": (STATE, Path.unlink, "state/.*missing"),
    "byte of model": (MODEL, flip_byte, "model/.*SHA-256"),
    "last byte of model": (MODEL, lambda p: flip_byte(p, -1), "model/.*SHA-256"),
    "byte of optimizer": (OPTIMIZER, flip_byte, "optimizer/.*SHA-256"),
    "byte of state": (STATE, flip_byte, "state/.*SHA-256"),
    "model cut": (MODEL, truncate, r"model/.*damaged: \d+ bytes of"),
    "state empty": (STATE, lambda p: truncate(p, 0), "state/.*damaged: 0 bytes of"),
    "model longer": (MODEL, lambda p: p.open("ab").write(b"x"), r"model/.*damaged: \d+ bytes"),
    "no manifest": ("manifest.json", Path.unlink, "manifest.json: missing"),
    "manifest cut": ("manifest.json", truncate, "manifest.json: damaged"),
    "manifest empty": ("manifest.json", lambda p: truncate(p, 0), "manifest.json: damaged"),
    "manifest without files": ("manifest.json", _edit(files={}), "names no files"),
    "manifest of another step": ("manifest.json", _edit(step=2), "of step 3, got step 2"),
    "manifest of the future": ("manifest.json", _edit(version=2), "expected version 1, got 2"),
    "manifest too deep": ("manifest.json", lambda p: p.write_bytes(DEEP), "manifest.json.* deep"),
    "manifest a list": ("manifest.json", lambda p: p.write_text("[1]"), "an object, got a list"),
    "manifest of a list of files": ("manifest.json", _edit(files=["x"]), "files: .* got a list"),
    "manifest with a size of text": (
        "manifest.json",
        _edit(files={STATE: {"size": "1", "sha256": ""}}),
        "size: expected an integer, got '1'",
    ),
    "manifest of elsewhere": (
        "manifest.json",
        _edit(files={"../step_00000002/manifest.json": {"size": 1, "sha256": ""}}),
        "model/00001-of-00001.safetensors: expected nothing, got a file",
    ),
    "state too deep": (STATE, _forge(DEEP), "state/.*nested too deeply"),
    "state a list": (STATE, _forge(b"[]"), "state/.*expected an object, got a list"),
    "watch of lists": (STATE, _forge(b'{"watch": {"a": []}}'), "watch.a: expected a number"),
    "loader a list": (STATE, _forge(b'{"loader": []}'), "loader: expected an object, got a list"),
    "guard with nothing": (STATE, _forge(b'{"guard": {}}'), "guard.steps: .* got nothing"),
    "config a text": (STATE, _forge(b'{"config": "x"}'), "config: expected an object, got 'x'"),
    "header no header": (MODEL, _forge(b"\0" * 64), "model/.*: damaged"),
    "header of parts too deep": (MODEL, _forge(_part_header(DEEP.decode())), "model/.*: damaged"),
    "header of parts a list": (MODEL, _forge(_part_header("[]")), "model/.*: damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_passed_over(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, damage, reason = DAMAGE[name]
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    newest = Checkpoint(tmp_path / "step_00000003")
    assert newest.damage() is None
    damage(newest.path / file)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        newest.verify()
    with caplog.at_level(logging.WARNING):
        used = checkpoint.latest(tmp_path)
    assert used.step == 2
    assert_equal(loaded(used), weights(*trained(2)))
    said = "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "step_00000002 is used" in said and str(newest.path) in said


@pytest.mark.parametrize("position", range(0, 400, 23))
def test_any_flipped_byte_of_the_manifest_is_found(tmp_path: Path, position: int) -> None:
    path = save(tmp_path, 1).path / "manifest.json"
    flip_byte(path, position)
    assert Checkpoint(path.parent).damage() is not None


def test_none_good_lists_each_with_its_reason(tmp_path: Path) -> None:
    flip_byte(save(tmp_path, 1).path / MODEL)
    (save(tmp_path, 2).path / STATE).unlink()
    with pytest.raises(ValueError, match="no good checkpoint") as error:
        checkpoint.latest(tmp_path)
    for part in (f"step_00000001/{MODEL}: damaged", f"step_00000002/{STATE}: missing"):
        assert part in str(error.value)


def test_loading_a_damaged_one_by_name_is_refused(tmp_path: Path) -> None:
    saved, (model, optimizer) = save(tmp_path, 1), trained(0)
    truncate(saved.path / MODEL)
    with pytest.raises(ValueError, match="model/.*: damaged"):
        saved.load_model(model)
    (saved.path / OPTIMIZER).unlink()
    with pytest.raises(FileNotFoundError, match="optimizer/00001.*missing"):
        saved.load_optimizer(model, optimizer)


def test_damaged_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    """Else a run resumed before them would delete the only good one."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        truncate(tmp_path / f"step_{step:08d}" / MODEL)
    save(tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path).step == 2


# ---- What does not fit ---------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    model, optimizer = trained(0)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.bias"):
        saved.load_optimizer(model, optimizer)
    model.register_buffer("more", torch.zeros(1))
    with pytest.raises(ValueError, match=r"differ in \['more'\]"):
        saved.load_model(model)
    del model.more
    model.register_buffer("rough", torch.zeros(4))
    with pytest.raises(ValueError, match=r"rough: expected \[4\], got \[3\]"):
        saved.load_model(model)


def test_a_type_without_a_name_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with (
        Saver(tmp_path, keep=1) as saver,
        pytest.raises(ValueError, match="phase: expected a dtype .*, got torch.complex64"),
    ):
        saver.save(step=1, model=model, optimizer=optimizer, state={})
    assert list(tmp_path.iterdir()) == []


# ---- The layout of before there were manifests ---------------------------------------------------


def test_an_older_checkpoint_loads(tmp_path: Path) -> None:
    """Written by the code of that time, tests/engine/checkpoint/checkpoint_cases.trained(4)."""
    old = Checkpoint(OLD)
    assert old.is_old and old.step == 4 and old.damage() is None
    assert old.state() == {"loader": {"epoch": 1}}
    expected = {**load_file(OLD / "model.safetensors"), **load_file(OLD / "optimizer.safetensors")}
    assert_equal(loaded(old), expected)
    assert checkpoint.latest(OLD.parent) == old


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_older_checkpoint_is_passed_over(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    for step in (3, 4):
        path = tmp_path / f"step_{step:08d}"
        path.mkdir()
        for file in OLD.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    damage(path / name)
    assert name in str(Checkpoint(path).damage())
    assert checkpoint.latest(tmp_path).step == 3
    save(tmp_path, 5, keep=2)
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [4, 5]
