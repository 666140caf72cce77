"""A run of the demo recipe that is small enough for a test, on the data set of the fixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.recipes import demo, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)


def small_run(dataset: Path, **overrides: object) -> TrainConfig:
    cfg = shrink(demo(), path=dataset, num_classes=9, text=TEXT)
    cfg = replace(
        cfg, data=replace(cfg.data, batch_size=8), num_steps=30, log_every=5, checkpoint_every=5
    )
    return replace(cfg, **overrides)  # type: ignore[arg-type]
