"""Measure a run: its newest checkpoint, and the untrained model it started from, on held-out
pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine import checkpoint
from m3i_fast.engine.precision import autocast, resolve_device
from m3i_fast.engine.trainer import build_objective
from m3i_fast.evaluation.collect import collect_features
from m3i_fast.evaluation.protocol import (
    Features,
    Measured,
    compare,
    measure_all,
    paired_hits,
)
from m3i_fast.evaluation.statistics import difference_intervals
from m3i_fast.objectives.mutual_information import MutualInformation
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.storage import write_atomically


def evaluate(
    run: Path, *, split: str = "heldout", batch_size: int = 256
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Measure the newest checkpoint of `run` and write run/evaluation.json; returns it and every
    item's hit."""
    cfg = TrainConfig.load(run / "config.json")
    trained, untrained = load_objective(run, cfg), build_untrained(cfg)
    measured = measure_all(
        _features(trained, cfg, split, batch_size), _features(untrained, cfg, split, batch_size)
    )
    figures = compare(measured)
    figures["trained_minus"] = {
        measure: {source: asdict(interval) for source, interval in intervals.items()}
        for measure, intervals in difference_intervals(paired_hits(measured)).items()
    }
    figures["train_images_per_s"] = throughput(run)
    write_atomically(run / "evaluation.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures, measured


def load_objective(run: Path, cfg: TrainConfig) -> MutualInformation:
    """The newest checkpoint of a run, in evaluation mode."""
    objective = build_untrained(cfg)
    checkpoint.latest(run / "checkpoints").load_model(objective)
    return objective


def build_untrained(cfg: TrainConfig) -> MutualInformation:
    """The model the run started from, in evaluation mode."""
    torch.manual_seed(cfg.seed)
    with resolve_device(cfg.device):
        return build_objective(cfg).eval()


def throughput(run: Path) -> float:
    """Images a second over the whole of training, the first logged interval left out."""
    rows = read_jsonl(run / "metrics.jsonl")
    rows = rows[1:] or rows
    return len(rows) / sum(1 / row["throughput/img_s"] for row in rows)


def _features(
    objective: MutualInformation, cfg: TrainConfig, split: str, batch_size: int
) -> tuple[Features, Features]:
    """Training and held-out pictures, one a concept in both, so that classes weigh alike."""
    device = resolve_device(cfg.device)

    def collect(name: str) -> Features:
        batches = evaluation_batches(
            cfg.data.path,
            name,
            image_size=cfg.vision.image_size,
            batch_size=batch_size,
            representatives_only=True,
            device_id=0 if device.type == "cuda" else None,
        )
        with autocast(cfg.precision, device):
            return collect_features(
                batches, objective.embed_images, objective.embed_captions, device
            )

    return collect(cfg.data.split), collect(split)
