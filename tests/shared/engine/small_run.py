"""A run of the demo recipe that is small enough for a test, on the data set of the fixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.config.fields import Gelu
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import demo, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)


def small_run(dataset: Path, **overrides: object) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(
        cfg, data=replace(cfg.data, batch_size=8), num_steps=30, log_every=5, checkpoint_every=5
    )
    return replace(cfg, **overrides)  # type: ignore[arg-type]


def as_clip(cfg: TrainConfig, mlp: Gelu = "quick_gelu") -> TrainConfig:
    """Return the run with towers as CLIP's: a norm first, causal texts, a head of one layer."""
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(cfg.vision, class_token=True, pre_norm=True, mlp=mlp, norm_eps=1e-5)
    text = replace(cfg.text, attention="causal", mlp=mlp, norm_eps=1e-5)
    return replace(
        cfg, vision=vision, text=text, objective=replace(cfg.objective, head_hidden_dim=0)
    )


def saved_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments of the newest checkpoint of a run."""
    newest = checkpoint.latest(run / "checkpoints")
    parts = ("model", "optimizer")
    return {f"{p}/{k}": v for p in parts for k, v in newest.shards(p).read().items()}


def assert_same_run(a: Path, b: Path) -> None:
    """Hold that two runs logged the same losses and saved the same tensors, bit for bit."""
    first, second = saved_tensors(a), saved_tensors(b)
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert not different
    losses = [
        [(row["step"], row["loss/total"]) for row in read_jsonl(run / "metrics.jsonl")]
        for run in (a, b)
    ]
    assert losses[0] == losses[1]
