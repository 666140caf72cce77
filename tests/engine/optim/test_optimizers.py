"""What an optimiser's config means: refusals, whose code runs, clipping once, exact resumes."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.optim import optimizers as optim
from m3i_fast.engine.optim.optimizers import build_optimizer
from tests.shared.engine import fused_stand_ins as stand_ins
from tests.shared.engine import optimiser_runs as runs

FUSED = {
    "te": OptimConfig(impl="te", lr=0.01, weight_decay=0.1, layer_decay=0.5),
    "apex": OptimConfig(impl="apex", lr=0.01, weight_decay=0.1, layer_decay=0.5),
    "apex_lamb": OptimConfig(name="lamb", impl="apex", lr=0.02, weight_decay=0.1, layer_decay=0.5),
}
PLAIN = {
    "adamw": OptimConfig(lr=0.01),
    "muon": OptimConfig(lr=0.01, matrices="muon", layer_decay=0.5),
    "lamb": OptimConfig(name="lamb", lr=0.01, layer_decay=0.5),
    "lars": OptimConfig(name="lars", lr=1.0),
}


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for both libraries, and leave to use them on the CPU."""
    stand_ins.apex(monkeypatch)
    stand_ins.transformer_engine(monkeypatch)
    monkeypatch.setattr(optim, "_expect_usable", lambda *_: None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"name": "lamb", "matrices": "muon"},
            r"optim\.matrices: expected adamw .* lamb, got muon",
        ),
        (
            {"name": "lars", "matrices": "muon"},
            r"optim\.matrices: expected adamw .* lars, got muon",
        ),
        ({"name": "lamb", "impl": "te"}, r"optim\.impl: expected auto or torch or apex .*got te"),
        ({"name": "lars", "impl": "apex"}, r"optim\.impl: expected auto or torch with .*got apex"),
        ({"name": "lars", "impl": "te"}, r"optim\.impl: expected auto or torch with .*got te"),
        ({"name": "lamb", "impl": "apex", "weight_decay": 0.0}, r"optim\.weight_decay"),
        ({"name": "lamb", "impl": "apex", "final_weight_decay": 0.0}, r"optim\.final_weight_decay"),
        ({"layer_decay": 0.0}, r"optim\.layer_decay: expected 0 < decay <= 1, got 0\.0"),
        ({"layer_decay": 1.1}, r"optim\.layer_decay"),
        ({"dcn_lr_scale": 0.0}, r"optim\.dcn_lr_scale: expected > 0, got 0\.0"),
        ({"weight_decay": -0.1}, r"optim\.weight_decay: expected >= 0, got -0\.1"),
        ({"final_weight_decay": -1.0}, r"optim\.final_weight_decay: expected >= 0, got -1\.0"),
        ({"final_lr": -1e-6}, r"optim\.final_lr: expected >= 0, got -1e-06"),
        ({"eps": 0.0}, r"optim\.eps: expected > 0 or none, got 0\.0"),
        ({"betas": (0.9, 1.0)}, r"optim\.betas: expected 0 <= beta < 1"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimConfig(**wrong)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("te", "pip install .*transformer-engine"),
        ("apex", "APEX_CUDA_EXT=1 pip install .* checkout of NVIDIA/apex"),
        ("apex_lamb", "APEX_CUDA_EXT=1 pip install .* checkout of NVIDIA/apex"),
    ],
)
def test_what_is_not_there_is_named(case: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = rf"optim\.impl: {FUSED[case].impl} needs a GPU, where the model is on cpu; and .*{words}"
    with pytest.raises(ValueError, match=said + ".*--optim.impl torch runs anywhere"):
        build_optimizer(FUSED[case], nn.Linear(2, 2))


def test_another_program_named_apex_is_not_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.put_in_place(monkeypatch, "apex", "apex.optimizers")
    assert importlib.util.find_spec("apex") is not None
    with pytest.raises(ValueError, match="checkout of NVIDIA/apex"):
        build_optimizer(FUSED["apex"], nn.Linear(2, 2))
    stand_ins.apex(monkeypatch)
    with pytest.raises(ValueError, match="needs a GPU") as refused:
        build_optimizer(FUSED["apex"], nn.Linear(2, 2))
    assert "install" not in str(refused.value)


def test_apex_is_given_what_torchs_are(fused: None) -> None:
    cfg = replace(FUSED["apex_lamb"], betas=(0.8, 0.9), clip_grad_norm=3.0)
    optimizer = build_optimizer(cfg, runs.small_vit())
    assert optimizer.clips and isinstance(optimizer.optimizers[0], stand_ins.FusedLAMB)
    assert stand_ins.FusedLAMB.seen == {
        "lr": 0.02,
        "bias_correction": True,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "amsgrad": False,
        "adam_w_mode": True,
        "grad_averaging": True,
        "set_grad_none": True,
        "max_grad_norm": 3.0,
        "use_nvlamb": False,
    }
    build_optimizer(replace(cfg, clip_grad_norm=0.0, eps=1e-4), runs.small_vit())
    assert stand_ins.FusedLAMB.seen["max_grad_norm"] == math.inf
    assert stand_ins.FusedLAMB.seen["eps"] == 1e-4


@pytest.mark.parametrize("impl", ["te", "apex"])
def test_fused_adam_is_given_what_torchs_is(impl: str, fused: None) -> None:
    optimizer = build_optimizer(FUSED[impl], runs.small_vit())
    assert not optimizer.clips and isinstance(optimizer.optimizers[0], stand_ins.FusedAdam)
    assert stand_ins.FusedAdam.seen == {
        "lr": 0.01,
        "bias_correction": True,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "adam_w_mode": True,
        "weight_decay": 0.1,
    }


def _assert_same_as_torchs(cfg: OptimConfig, device: str) -> None:
    # Every step is clipped hard, and eps tells small gradients: another bound would be seen.
    cfg = replace(cfg, clip_grad_norm=0.01, eps=1e-3)
    model, twin, start = (runs.small_vit(device) for _ in range(3))
    for vit in (model, twin):
        vit.norm.bias.requires_grad_(False)  # they count the steps of a group, not of a parameter
    runs.run(cfg, model, clip=True)
    runs.run(replace(cfg, impl="torch"), twin, clip=True)
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    runs.assert_same_change(model, trained, start)


@pytest.mark.parametrize("case", FUSED)
def test_fused_steps_are_torchs_and_clipped_once(case: str, fused: None) -> None:
    _assert_same_as_torchs(FUSED[case], "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", FUSED)
def test_fused_steps_on_a_gpu_are_torchs(case: str) -> None:
    module, _ = optim._LIBRARIES[FUSED[case].impl]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    _assert_same_as_torchs(FUSED[case], "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in PLAIN if case != "muon"])  # bf16 there
def test_steps_on_a_gpu_are_the_cpus(case: str) -> None:
    model, twin, start = runs.small_vit("cuda"), runs.small_vit(), runs.small_vit()
    runs.run(PLAIN[case], model)
    runs.run(PLAIN[case], twin)
    runs.assert_same_change(model, dict(twin.named_parameters()), start)


@pytest.mark.parametrize("case", ["apex", "apex_lamb"])
def test_the_norm_is_told_whoever_clips(case: str, fused: None) -> None:
    cfg, model = replace(FUSED[case], clip_grad_norm=0.5), runs.small_vit()
    optimizer = build_optimizer(cfg, model)
    runs.set_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = optimizer.clip_grad_norm(list(model.parameters()), cfg.clip_grad_norm).total
    expected = torch.cat([grad.flatten().double() for grad in before]).norm()
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    factor = 1.0 if optimizer.clips else 0.5 / float(expected)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, factor * b, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("case", [*PLAIN, *FUSED])
def test_a_loaded_checkpoint_continues_bit_for_bit(case: str, fused: None, tmp_path: Path) -> None:
    cfg = (PLAIN | FUSED)[case]
    model, other = runs.small_vit(), runs.small_vit()
    optimizer = runs.run(cfg, model, steps=range(5))
    with Saver(tmp_path, keep=1) as saver:
        saver.save(step=5, model=model, optimizer=optimizer, state={})
    saved = checkpoint.latest(tmp_path)
    # A fresh optimiser, and one that has gone another way before.
    for before in (range(0), range(7)):
        resumed = runs.run(cfg, other, steps=before)
        saved.load_model(other)
        saved.load_optimizer(other, resumed)
        runs.run(cfg, other, resumed, steps=range(5, 9))
        whole = runs.small_vit()
        runs.run(cfg, whole, steps=range(9))
        for (name, a), b in zip(whole.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_gradients_are_dropped_or_zeroed() -> None:
    model = runs.small_vit()
    optimizer = build_optimizer(PLAIN["lamb"], model)
    for drop in (False, True):
        runs.set_gradients(model, 0)
        optimizer.zero_grad(set_to_none=drop)
        if drop:
            assert all(p.grad is None for p in model.parameters())
        else:
            assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
