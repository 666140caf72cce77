"""The encoder of a frozen teacher as a config, where the teacher is one of our runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.run_encoder import NamedEncoder, expect_run

TIMM = "timm:"
"""What the name of a teacher of timm begins with."""


def teacher_vision(spec: str, image_size: int) -> VisionConfig | None:
    """Return the encoder that `spec` names, as it reads images of that size; None for one of timm.

    Raises FileNotFoundError where there is no such run, and ValueError as `NamedEncoder.of`.
    """
    if spec.startswith(TIMM):
        return None
    return replace(run_vision(NamedEncoder.of(spec).run), image_size=image_size)


def run_vision(run: Path) -> VisionConfig:
    """Return the image encoder of a run of ours. Raises FileNotFoundError where there is none."""
    expect_run(run, "teacher", "; or RUN,which=ema, timm:NAME or timm:NAME:FILE.safetensors")
    return TrainConfig.load(run / "config.json").vision
