"""Whole runs with the optimisers that are not the default's: they learn and resume bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import demo, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
OPTIMISERS = {
    "adamw": OptimConfig(lr=3e-3),
    "lamb": OptimConfig(name="lamb", lr=1e-2),
    "lars": OptimConfig(name="lars", lr=10.0, clip_grad_norm=0.0),
}


def _config(dataset: Path, optim: OptimConfig) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=8),
        num_steps=20,
        log_every=5,
        checkpoint_every=15,
        optim=replace(optim, layer_decay=0.8, freeze_patch_embed=True),
    )


def _weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(run / "checkpoints")
    parts = ("model", "optimizer")
    return {f"{p}/{k}": v for p in parts for k, v in newest.shards(p).read().items()}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_run_learns_and_resumes_bit_for_bit(name: str, dataset: Path, tmp_path: Path) -> None:
    cfg, whole, again = _config(dataset, OPTIMISERS[name]), tmp_path / "whole", tmp_path / "again"
    trainer = Trainer(cfg, whole)
    start = {k: v.clone() for k, v in trainer.objective.state_dict().items()}
    trainer.train()
    rows = read_jsonl(whole / "metrics.jsonl")
    assert rows[-1]["loss/total"] < rows[0]["loss/total"]
    assert all(row["optim/grad_norm"] > 0 for row in rows)

    end = trainer.objective.state_dict()
    frozen = [f"{e}.patch_embed.weight" for e in ("encoder", "target_encoder.encoder")]
    assert all(torch.equal(start[key], end[key]) for key in frozen)
    learnt = [f"{e}.blocks.0.proj.weight" for e in ("encoder", "target_encoder.encoder")]
    assert not any(torch.equal(start[key], end[key]) for key in learnt)

    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000020")
    Trainer(cfg, again, resume=True).train()
    first, second = _weights(whole), _weights(again)
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []
