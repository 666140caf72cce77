"""The encoder of a frozen teacher as a config, where the teacher is one of our runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vision import VisionConfig

TIMM = "timm:"
"""What the name of a teacher of timm begins with."""


def teacher_vision(spec: str, image_size: int) -> VisionConfig | None:
    """Return the encoder that `spec` names, as it reads images of that size; None for one of timm.

    Raises FileNotFoundError where there is no such run.
    """
    return None if spec.startswith(TIMM) else replace(run_vision(Path(spec)), image_size=image_size)


def run_vision(run: Path) -> VisionConfig:
    """Return the image encoder of a run of ours. Raises FileNotFoundError where there is none."""
    config = run / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"teacher: expected a run directory, timm:NAME or timm:NAME:FILE.safetensors, got "
            f"{str(run)!r}, which has no config.json"
        )
    return TrainConfig.load(config).vision
