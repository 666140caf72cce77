"""The settings of a run as frozen dataclasses, checked when they are made; no torch here.

`TrainConfig` is the root: it is made by a recipe or read from a run's config.json, and changed with
`dataclasses.replace`.
"""

from m3i_fast.config.convert import differences
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.config.guard import GuardConfig
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.objective.heads import DecoderConfig, ProjectorConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.config.optim import EmaConfig, OptimConfig
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.config.telemetry import TelemetryConfig
from m3i_fast.config.train import Backend, Precision, TrainConfig

__all__ = [
    "Backend",
    "BalanceConfig",
    "DecoderConfig",
    "EmaConfig",
    "GuardConfig",
    "InternImageConfig",
    "LoaderConfig",
    "MixingConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "Precision",
    "ProjectorConfig",
    "TelemetryConfig",
    "Term",
    "TextConfig",
    "TrainConfig",
    "ViTConfig",
    "ViewConfig",
    "VisionConfig",
    "differences",
]
