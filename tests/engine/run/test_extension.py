"""A run that goes on with another number of steps: exact where its schedules are, else told."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.optim import EmaConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.run.extension import log_new_num_steps, schedules_of
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import demo, demo_method
from tests.shared.engine.small_run import assert_same_run, small_run


def _constant(dataset: Path, **changes: object) -> TrainConfig:
    """A run whose every schedule is a constant."""
    cfg = small_run(dataset, num_steps=5, ema=EmaConfig(momentum=0.99, final_momentum=0.99))
    optim = replace(cfg.optim, warmup_fraction=0.0, final_lr=cfg.optim.lr)
    return replace(cfg, optim=optim, **changes)  # type: ignore[arg-type]


def _resume(cfg: TrainConfig, out: Path, *flags: str) -> int:
    cfg.save(out.with_suffix(".json"))
    arguments = ["--config", str(out.with_suffix(".json")), "--out", str(out), "--resume"]
    return main(["train", *arguments, *flags])


def test_a_constant_run_that_is_extended_equals_a_longer_one(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cfg, extended = _constant(dataset), tmp_path / "extended"
    Trainer(cfg, extended).train()
    assert _resume(cfg, extended, "--num-steps", "10") == 0
    Trainer(replace(cfg, num_steps=10), tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", extended)
    assert TrainConfig.load(extended / "config.json") == replace(cfg, num_steps=10)
    assert "--num-steps 10 in place of 5, from step 5 on: the same run as one of 10" in caplog.text
    assert _resume(replace(cfg, num_steps=10), extended) == 0  # its config is the longer run's


def test_python_extends_a_run_as_the_command_does(dataset: Path, tmp_path: Path) -> None:
    cfg, out = small_run(dataset, num_steps=2), tmp_path / "run"
    longer = replace(cfg, num_steps=3)
    assert m3i_fast.train(cfg, out).step == 2
    with pytest.raises(ValueError, match="num_steps: 2 != 3"):
        m3i_fast.train(longer, out, resume=True)
    assert m3i_fast.train(longer, out, resume=True, new_num_steps=True).step == 3
    wider = replace(longer, num_steps=4, data=replace(longer.data, batch_size=16))
    with pytest.raises(ValueError, match="batch"):
        m3i_fast.train(wider, out, resume=True, new_num_steps=True)
    outcome = m3i_fast.train(wider, out, resume=True, new_num_steps=True, new_batch_size=True)
    assert outcome.step == 4


def test_a_cosine_run_that_is_extended_takes_the_new_schedule_and_says_what_jumps(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg, out = small_run(dataset, num_steps=5, log_every=1), tmp_path / "run"
    Trainer(cfg, out).train()
    assert _resume(cfg, out, "--num-steps=10") == 0
    longer = schedules_of(replace(cfg, num_steps=10))
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 11))
    np.testing.assert_allclose([row["optim/lr"] for row in rows[5:]], longer["optim.lr"][5:])
    momentum = [row["optim/ema_momentum"] for row in rows[5:]]
    np.testing.assert_allclose(momentum, longer["ema.momentum"][5:])
    [told] = [r.getMessage() for r in caplog.records if "in place of 5" in r.getMessage()]
    assert "not the run that 10 steps from its start would be" in told
    jumps = dict(re.findall(r"([\w.]+) jumps from \S+ to ([\d.e-]+\d)", told))
    assert jumps == {name: f"{longer[name][5]:.4g}" for name in ("optim.lr", "ema.momentum")}
    assert "optim.lr jumps from 0 to" in told


def test_a_schedule_that_differed_before_alone_does_not_jump(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warm-up that is over, of a rate that is constant where the run goes on."""
    cfg = _constant(dataset)
    optim = replace(cfg.optim, warmup_fraction=0.2, lr_decay_fraction=0.2, final_lr=0.0)
    cfg = replace(cfg, num_steps=20, optim=optim)
    log_new_num_steps(cfg, before=10, steps_taken=6)
    assert "optim.lr had other values before" in caplog.text and "jumps" not in caplog.text


def test_fewer_steps_than_were_taken_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, out = _constant(dataset), tmp_path / "run"
    Trainer(cfg, out).train()
    assert _resume(cfg, out, "--num-steps", "4") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--num-steps: expected at least the 5 steps that the run has taken, got 4" in said
    assert TrainConfig.load(out / "config.json") == cfg
    assert [c.step for c in checkpoint.checkpoints(out / "checkpoints")] == [5]


def test_another_number_that_nobody_typed_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe's own number does not lengthen a run that was begun with --num-steps."""
    cfg, out = _constant(dataset), tmp_path / "run"
    Trainer(cfg, out).train()
    assert _resume(replace(cfg, num_steps=2000), out) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "num_steps: 5 != 2000 (--num-steps 5 goes on to where it was to end" in said
    assert TrainConfig.load(out / "config.json") == cfg


def test_with_another_number_of_steps_all_else_is_refused_as_before(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, out = _constant(dataset), tmp_path / "run"
    Trainer(cfg, out).train()
    assert _resume(replace(cfg, seed=3), out, "--num-steps", "10") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "seed: 0 != 3" in said and "num_steps" not in said
    assert TrainConfig.load(out / "config.json") == cfg


def test_a_mask_that_grows_is_a_schedule_too() -> None:
    cfg = demo_method("mae")
    mixing = replace(cfg.objective.mixing, mask_ratio=0.5, final_mask_ratio=0.75)
    growing = replace(cfg, num_steps=3, objective=replace(cfg.objective, mixing=mixing))
    assert "objective.mixing.mask_ratio" not in schedules_of(demo())
    ratios = schedules_of(growing)["objective.mixing.mask_ratio"]
    np.testing.assert_allclose(ratios, [0.5, 0.625, 0.75])
