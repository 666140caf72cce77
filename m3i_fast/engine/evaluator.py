"""Measure a run on held-out pictures, beside the untrained model it started from."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.engine import checkpoint
from m3i_fast.engine.model import build_objective
from m3i_fast.engine.precision import autocast, resolve_device
from m3i_fast.evaluation.collect import collect_features, labelled_drawings
from m3i_fast.evaluation.correspondence import patch_correspondence, patch_pixels, pixel_tokens
from m3i_fast.evaluation.dense import (
    NUM_SCENES,
    DenseResult,
    build_scenes,
    guess_scenes,
    probe_scenes,
)
from m3i_fast.evaluation.features import Features
from m3i_fast.evaluation.protocol import Measured, compare, measure_all, trained_minus
from m3i_fast.objectives.mutual_information import MutualInformation
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader, LoaderConfig, ViewConfig, evaluation_batches
from m3i_fast.pipelines.manifest import read_manifest
from m3i_fast.storage import write_atomically


def evaluate(
    run: Path,
    *,
    split: str = "heldout",
    batch_size: int = 256,
    baselines: bool = True,
    data: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Measure the newest checkpoint of `run` and write run/evaluation.json.

    baselines: measure the untrained model, raw pixels and chance beside it, which takes longer than
    the trained one. data: the data set whose labels and captions measures are taken by, as when the
    run's own, which is used otherwise, has few. Returns what was written, and every item's hit.
    Raises ValueError where the two have different tokenizers.
    """
    cfg = TrainConfig.load(run / "config.json")
    if data is not None:
        _expect_same_tokenizer(cfg.data.path, data)
        cfg = replace(cfg, data=replace(cfg.data, path=data))
    models = {"trained": load_objective(run, cfg)}
    if baselines:
        models["untrained"] = build_untrained(cfg)
    measured = _measure(models, cfg, split, batch_size, baselines=baselines)
    figures = compare(measured)
    figures["trained_minus"] = {
        measure: {source: asdict(interval) for source, interval in intervals.items()}
        for measure, intervals in trained_minus(measured).items()
    }
    figures["train_images_per_s"] = throughput(run)
    write_atomically(run / "evaluation.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures, measured


def evaluate_untrained(
    cfg: TrainConfig, *, split: str = "heldout", batch_size: int = 256
) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Measure what a run of `cfg` starts from, raw pixels and chance, as `evaluate` does."""
    models = {"untrained": build_untrained(cfg)}
    measured = _measure(models, cfg, split, batch_size, baselines=True)
    return compare(measured), measured


def _measure(
    models: Mapping[str, MutualInformation],
    cfg: TrainConfig,
    split: str,
    batch_size: int,
    *,
    baselines: bool,
) -> dict[str, Measured]:
    features = {who: _features(model, cfg, split, batch_size) for who, model in models.items()}
    measured = measure_all(features, baselines=baselines)
    for who, share in _correspondence(models, cfg, split, batch_size).items():
        if who in measured:
            measured[who].hits["patch_correspondence"] = share
    for who, result in _scenes(models, measured, cfg, split, batch_size).items():
        measured[who].add_scenes(result)
    return measured


def _expect_same_tokenizer(of_run: Path, of_measures: Path) -> None:
    ours, theirs = (read_manifest(path).tokenizer.fingerprint for path in (of_run, of_measures))
    if ours != theirs:
        raise ValueError(
            f"data: expected {of_measures} to have the tokenizer of {of_run}, {ours[:8]}, got "
            f"{theirs[:8]}"
        )


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
    path, name = run / "metrics.jsonl", "throughput/img_s"
    rates = [row[name] for row in read_jsonl(path) if row.get(name, 0) > 0]
    rates = rates[1:] or rates
    if not rates:
        raise ValueError(f"{path}: expected rows with {name}, got none: no step was logged")
    return len(rates) / sum(1 / rate for rate in rates)


def _correspondence(
    models: Mapping[str, MutualInformation], cfg: TrainConfig, split: str, batch_size: int
) -> dict[str, Tensor]:  # who -> [M] fp64, share of a picture's patches found in another crop
    """Two fresh crops of every held-out concept's picture, the same ones for every run."""
    device = resolve_device(cfg.device)
    views = ViewConfig(size=cfg.vision.image_size, scale=(0.5, 1.0))
    settings = LoaderConfig(
        path=cfg.data.path,
        split=split,
        batch_size=1,
        global_views=views,
        alternates=False,
        max_pixels=cfg.data.max_pixels,
    )
    loader = Loader(settings, device_id=0 if device.type == "cuda" else None)
    crops: dict[int, tuple[Tensor, Tensor]] = {}  # [2, 3, S, S] uint8, [1, 2, 5]
    for _ in range(loader.steps_per_epoch):
        batch = next(loader)
        if int(batch.sample_id) == int(batch.group_id):  # one picture a concept
            crops[int(batch.sample_id)] = torch.cat(batch.global_views[:2]), batch.boxes
    loader.close()
    ordered = [crops[i] for i in sorted(crops)]
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(ordered), batch_size):
        pairs, boxes = zip(*ordered[start : start + batch_size], strict=True)
        first, second = torch.stack(pairs, 1).to(device)
        for who, share in _found_patches(models, cfg, (first, second), torch.cat(boxes)).items():
            parts.setdefault(who, []).append(share)
    return {who: torch.cat(shares).double().cpu() for who, shares in parts.items()}


def _found_patches(
    models: Mapping[str, MutualInformation],
    cfg: TrainConfig,
    pair: tuple[Tensor, Tensor],  # 2 x [B, 3, S, S] uint8
    boxes: Tensor,  # [B, 2, 5]
) -> dict[str, Tensor]:  # who -> [b] fp32, of the pictures that have a patch to ask about
    tokens = {
        who: tuple(model.embed_images(view)[0] for view in pair) for who, model in models.items()
    }
    tokens["pixels"] = tuple(pixel_tokens(view, cfg.vision.grid) for view in pair)
    shares: dict[str, Tensor] = {}
    for who, (first, second) in tokens.items():
        share, chance, asked = patch_correspondence((first, second), pair, boxes.to(pair[0].device))
        shares |= {who: share[asked > 0], "chance": chance[asked > 0]}
    return shares


def _scenes(
    models: Mapping[str, MutualInformation],
    sources: Container[str],  # whose results are asked for
    cfg: TrainConfig,
    split: str,
    batch_size: int,
) -> dict[str, DenseResult]:
    """Patches of scenes of several drawings, the same ones for every run on the same data."""
    device = resolve_device(cfg.device)
    sets = build_scenes(
        *(
            labelled_drawings(_whole_pictures(cfg, name, batch_size), 4 * NUM_SCENES)
            for name in (cfg.data.split, split)
        ),
        grid=cfg.vision.grid,
    )

    def tokens(model: MutualInformation, views: Tensor) -> Tensor:
        return model.embed_images(views)[0]

    with autocast(cfg.precision, device):
        results = {
            who: probe_scenes(sets, partial(tokens, model), device) for who, model in models.items()
        }
        if "pixels" in sources:
            pixels = partial(patch_pixels, grid=cfg.vision.grid)
            results["pixels"] = probe_scenes(sets, pixels, device)
    if "chance" in sources:
        results["chance"] = guess_scenes(sets)
    return results


def _features(
    objective: MutualInformation, cfg: TrainConfig, split: str, batch_size: int
) -> tuple[Features, Features]:
    """Training and held-out pictures, one a concept in both, so that classes weigh alike."""
    device = resolve_device(cfg.device)

    def collect(name: str) -> Features:
        with autocast(cfg.precision, device):
            return collect_features(
                _whole_pictures(cfg, name, batch_size),
                objective.embed_images,
                objective.embed_captions,
                device,
            )

    return collect(cfg.data.split), collect(split)


def _whole_pictures(cfg: TrainConfig, split: str, batch_size: int) -> Iterator[Batch]:
    """One picture a concept, in the order of the shards."""
    return evaluation_batches(
        cfg.data.path,
        split,
        image_size=cfg.vision.image_size,
        batch_size=batch_size,
        representatives_only=True,
        max_pixels=cfg.data.max_pixels,
        device_id=0 if resolve_device(cfg.device).type == "cuda" else None,
    )
