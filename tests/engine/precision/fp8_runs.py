"""The smallest run of M3I with all terms whose products FP8 takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config import Precision, TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.recipes import demo, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)


def tiny(data: Path, *, precision: Precision, seed: int = 0, num_steps: int = 200) -> TrainConfig:
    """Batches of 16 drawings of 32 pixels, two blocks of width 32."""
    cfg = shrink(demo(), path=data, num_classes=9, text=TEXT)
    assert cfg.data.local_views is not None
    local_views = replace(cfg.data.local_views, count=1)
    mixing = replace(cfg.objective.mixing, dense_fraction=1.0, num_queries=8)
    return replace(
        cfg,
        seed=seed,
        num_steps=num_steps,
        data=replace(cfg.data, batch_size=16, local_views=local_views),
        objective=replace(cfg.objective, mixing=mixing),
        precision=precision,
        fp8_min_dim=32,
        device="cpu",
        checkpoint_every=num_steps,
    )
