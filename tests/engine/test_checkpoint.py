"""Checkpoints: whole or absent, exact, and refused when damaged."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from m3i_fast.engine import checkpoint
from m3i_fast.engine.optim import OptimConfig, Optimizers, build_optimizer
from m3i_fast.engine.saver import Saver


def _trained(
    seed: int, steps: int = 3, cfg: OptimConfig | None = None
) -> tuple[nn.Module, Optimizers]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    model[1].requires_grad_(False)
    model.add_module("blocks", nn.Linear(2, 2))
    optimizer = build_optimizer(cfg or OptimConfig(lr=1e-2), model)
    _steps(model, optimizer, steps)
    return model, optimizer


def _steps(model: nn.Module, optimizer: Optimizers, count: int) -> None:
    for step in range(count):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _save(directory: Path, step: int, seed: int = 0, keep: int = 2) -> checkpoint.Checkpoint:
    model, optimizer = _trained(seed)
    with Saver(directory, keep=keep) as saver:
        saver.save(step=step, model=model, optimizer=optimizer, state={"at": step})
    return checkpoint.checkpoints(directory)[-1]


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_a_loaded_checkpoint_continues_bit_for_bit(
    tmp_path: Path, matrices: Literal["adamw", "muon"]
) -> None:
    cfg = OptimConfig(lr=1e-2, matrices=matrices)
    model, optimizer = _trained(0, cfg=cfg)
    with Saver(tmp_path, keep=1) as saver:
        saver.save(step=3, model=model, optimizer=optimizer, state={"loader": {"x": 1}})
    saved = checkpoint.latest(tmp_path)
    other, other_optimizer = _trained(1, cfg=cfg)
    saved.load_model(other)
    saved.load_optimizer(other, other_optimizer)
    assert saved.step == 3 and saved.state() == {"loader": {"x": 1}}
    for m, o in ((model, optimizer), (other, other_optimizer)):
        _steps(m, o, 4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept_and_unfinished_ones_are_not_found(tmp_path: Path) -> None:
    for step in (1, 5, 12):
        _save(tmp_path, step)
    (tmp_path / ".step_00000099.tmp-1").mkdir()
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [5, 12]
    assert checkpoint.latest(tmp_path).step == 12


def test_nothing_to_load_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.latest(tmp_path / "absent")


def test_damage_is_named(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    model, optimizer = _trained(0)
    file = saved.path / "model" / "00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model: damaged"):
        saved.load_model(model)
    (saved.path / "optimizer" / "00001-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"optimizer/00001.*missing"):
        saved.load_optimizer(model, optimizer)


def test_another_models_moments_are_refused(tmp_path: Path) -> None:
    saved = _save(tmp_path, 1)
    model, optimizer = _trained(0)
    model[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.bias"):
        saved.load_optimizer(model, optimizer)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A file-size limit in a child stands for the full disk: writing fails half-way."""
    _save(tmp_path, 1)
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_checkpoint import _save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\n"
        f"_save(Path({str(tmp_path)!r}), 2)\n"
    )
    assert resource.RLIMIT_FSIZE is not None
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert child.returncode != 0 and "Error" in child.stderr
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    model, _ = _trained(2)
    checkpoint.latest(tmp_path).load_model(model)
