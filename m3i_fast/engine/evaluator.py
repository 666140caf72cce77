"""Evaluates a run on held-out pictures, beside the untrained model that it started from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.durable_files import write_atomically
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.precision.arithmetic import autocast, resolve_device
from m3i_fast.engine.run.data_record import read_record
from m3i_fast.evaluation.dense.correspondence import (
    measure_correspondence,
    patch_pixels,
    pixel_tokens,
)
from m3i_fast.evaluation.dense.patch_probe import (
    NUM_SCENES,
    DenseResult,
    build_scenes,
    guess_scenes,
    probe_scenes,
)
from m3i_fast.evaluation.feature_extraction import collect_features, labelled_drawings
from m3i_fast.evaluation.features import Features
from m3i_fast.evaluation.held_out import HeldOut, describe_held_out
from m3i_fast.evaluation.protocol import SourceResults, measure_all, tabulate_figures, trained_minus
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.near_duplicates import COMPARED_SIZE
from m3i_fast.pipelines.dataset.sample_table import split_digest
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from m3i_fast.pipelines.opened.mixture import read_described
from m3i_fast.pipelines.storage.objects import place_of
from m3i_fast.pipelines.storage.remote import folder_at, manifest_at

MOST_PICTURES = 100_000  # of a split: their features and probes are one CPU's


class Evaluation(NamedTuple):
    """The figures of a run, and the results of each source item by item."""

    figures: dict[str, Any]  # of evaluation.json
    measured: dict[str, SourceResults]
    held_out: HeldOut


def evaluate(
    run: Path,
    *,
    split: str = "heldout",
    batch_size: int = 256,
    baselines: bool = True,
    data: Path | None = None,
) -> Evaluation:
    """Evaluate the newest checkpoint of `run` and write run/evaluation.json.

    Beside the figures the file says, as "evaluated", of which step and on which data they are:
    "step", "split", and "data", the name of the data set and the SHA-256 of its manifest.

    Where the run has an EMA of its encoder, that is evaluated too, as `ema` (`build_averaged`).
    baselines: also evaluate the untrained model, raw pixels and chance, which takes longer than the
    trained one. data: data set whose labels and captions the measures use, for a run whose own has
    few or are several that are mixed; None for the run's own. Raises ValueError where the two have
    different tokenizers, and for a run on a mixture without `data`.
    """
    cfg = TrainConfig.load(run / "config.json")
    if data is not None:
        one = replace(cfg.data, path=data, mixture=())
        _expect_same_tokenizer(run, cfg, one)
        cfg = replace(cfg, data=one)
    elif cfg.data.mixture:
        raise ValueError(
            f"--held-out-data: expected the data set to measure on, since {run} was trained on a "
            f"mixture of {' and '.join(place_of(part.path) for part in cfg.data.mixture_parts)}, "
            "got none"
        )
    evaluated = checkpoint.latest(run / "checkpoints")
    models = {"trained": _load(evaluated, cfg)}
    if cfg.objective.uses(encoder="momentum"):
        models["ema"] = build_averaged(models["trained"], cfg)
    if baselines:
        models["untrained"] = build_untrained(cfg)
    figures, measured, held_out = _measure(models, cfg, split, batch_size, baselines=baselines)
    figures["trained_minus"] = {
        measure: {source: asdict(interval) for source, interval in intervals.items()}
        for measure, intervals in trained_minus(measured, held_out).items()
    }
    figures["train_images_per_s"] = throughput(run)
    manifest = manifest_at(cfg.data)
    of_data = {"name": manifest.name, "sha256": manifest.digest}
    facts = {"evaluated": {"step": evaluated.step, "split": split, "data": of_data}}
    content = json.dumps(figures | facts, indent=2) + "\n"
    write_atomically(run / "evaluation.json", content.encode())
    return Evaluation(figures, measured, held_out)


def evaluate_untrained(
    cfg: TrainConfig, *, split: str = "heldout", batch_size: int = 256
) -> Evaluation:
    """Evaluate what a run of `cfg` starts from, raw pixels and chance, as `evaluate` does."""
    models = {"untrained": build_untrained(cfg)}
    return _measure(models, cfg, split, batch_size, baselines=True)


def _measure(
    models: Mapping[str, MutualInformation],
    cfg: TrainConfig,
    split: str,
    batch_size: int,
    *,
    baselines: bool,
) -> Evaluation:
    _expect_probes(cfg, split)
    digest = split_digest(folder_at(replace(cfg.data, split=split)), split)
    held_out = describe_held_out(
        _whole_pictures(cfg, split, batch_size, image_size=COMPARED_SIZE),
        _whole_pictures(cfg, cfg.data.split, batch_size, image_size=COMPARED_SIZE, variants=True),
    )
    features = {who: _features(model, cfg, split, batch_size) for who, model in models.items()}
    measured = measure_all(features, baselines=baselines)
    correspondence = _correspondence(models, measured, cfg, split, batch_size)
    for who, (share, group) in correspondence.items():
        aligned = held_out.align(share, group, math.nan)
        measured[who].hits["patch_correspondence_centred"] = aligned
    for who, result in _scenes(models, measured, cfg, split, batch_size).items():
        measured[who].add_scenes(result, held_out)
    figures = {
        **tabulate_figures(measured, held_out),
        "split_digest": digest,
    }
    return Evaluation(figures, measured, held_out)


def _expect_probes(cfg: TrainConfig, split: str) -> None:
    """Raise ValueError for data that the probes, fitted on the CPU in fp64, cannot be fitted to."""
    manifest = manifest_at(cfg.data)
    most = max(manifest.split(name).num_samples for name in (cfg.data.split, split))
    if most > MOST_PICTURES:
        raise ValueError(
            f"{place_of(cfg.data.path)}: expected at most {MOST_PICTURES:,} pictures a split, "
            f"whose features one CPU holds and fits probes to, got {most:,}: measure it by the "
            f"field's protocols, m3i-fast evaluate RUN --data {place_of(cfg.data.path)}"
        )
    info = manifest.split(split)
    if info.num_labels < info.num_samples:
        raise ValueError(
            f"split {split} of {place_of(cfg.data.path)}: expected a class of every picture, got "
            f"{info.num_samples - info.num_labels} of {info.num_samples} without: measure what "
            f"they have by m3i-fast evaluate RUN --data {place_of(cfg.data.path)}"
        )


def _expect_same_tokenizer(run: Path, cfg: TrainConfig, of_measures: LoaderConfig) -> None:
    known = read_record(run) or read_described(cfg.data)
    ours, theirs = (of.tokenizer.fingerprint for of in (known, read_described(of_measures)))
    if ours != theirs:
        raise ValueError(
            f"data: expected {place_of(of_measures.path)} to have the tokenizer of the run, "
            f"{ours[:8]}, got {theirs[:8]}; pack it with the same tokenizer"
        )


def load_objective(run: Path, cfg: TrainConfig) -> MutualInformation:
    """Return the model of the newest checkpoint of a run, in evaluation mode."""
    return _load(checkpoint.latest(run / "checkpoints"), cfg)


def _load(saved: checkpoint.Checkpoint, cfg: TrainConfig) -> MutualInformation:
    objective = build_untrained(cfg)
    saved.load_model(objective)
    return objective


def build_untrained(cfg: TrainConfig) -> MutualInformation:
    """Return the model that the run started from, in evaluation mode."""
    torch.manual_seed(cfg.seed)
    with resolve_device(cfg.device):
        return build_objective(cfg).eval()


def build_averaged(trained: MutualInformation, cfg: TrainConfig) -> MutualInformation:
    """Return a model with the EMA of the trained encoder as its encoder, in evaluation mode.

    Only its tokens are measured, as those of the teacher's backbone in DINO (arXiv 2104.14294,
    section 3.1). Captions are not: the head that matches them has no average, and was trained on
    the tokens of the trained encoder.
    """
    terms = tuple(term for term in cfg.objective.active_terms if term.encoder == "momentum")
    averaged = build_untrained(replace(cfg, objective=replace(cfg.objective, terms=terms)))
    averaged.encoder.load_state_dict(trained.target_encoder.encoder.state_dict())
    return averaged


def throughput(run: Path) -> float:
    """Return the images a second over the whole training, without the first logged interval.

    Raises ValueError where metrics.jsonl has no row with throughput/img_s.
    """
    path, name = run / "metrics.jsonl", "throughput/img_s"
    rates = [row[name] for row in read_jsonl(path) if row.get(name, 0) > 0]
    rates = rates[1:] or rates
    if not rates:
        raise ValueError(f"{path}: expected rows with {name}, got none: no step was logged")
    return len(rates) / sum(1 / rate for rate in rates)


def _correspondence(
    models: Mapping[str, MutualInformation],
    sources: Container[str],  # whose results are computed
    cfg: TrainConfig,
    split: str,
    batch_size: int,
) -> dict[str, tuple[Tensor, Tensor]]:  # who -> [m] fp64, share of patches located; [m] the concept
    """Measure patch correspondence of two crops of each held-out picture, the same every time."""
    device = resolve_device(cfg.device)
    views, boxes, group = _two_crops(cfg, split)
    embeds: dict[str, Callable[[Tensor], Tensor]] = {
        who: partial(_patch_tokens, model) for who, model in models.items()
    }
    if "pixels" in sources:
        embeds["pixels"] = partial(pixel_tokens, grid=cfg.vision.grid)
    pairs = [*zip(*(column.split(batch_size) for column in (*views, boxes)), strict=True)]
    results = {}
    for who, embed in embeds.items():
        measured = measure_correspondence(embed, lambda: pairs, device)
        has_queries = measured.num_queries > 0
        results[who] = (measured.share[has_queries].double(), group[has_queries])
        if "chance" in sources:
            results["chance"] = (measured.chance[has_queries].double(), group[has_queries])
    return results


def _two_crops(cfg: TrainConfig, split: str) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Return views 2 x [M, 3, S, S] uint8, boxes [M, 2, 5] and concepts [M] in ascending order."""
    device = resolve_device(cfg.device)
    settings = LoaderConfig(
        path=cfg.data.path,
        split=split,
        batch_size=1,
        global_views=ViewConfig(size=cfg.vision.image_size, scale=(0.5, 1.0)),
        alternates=False,
        max_pixels=cfg.data.max_pixels,
        lanes=1,  # one picture after the other
    ).with_bucket_fields_of(cfg.data)
    loader = Loader(settings, device_id=0 if device.type == "cuda" else None)
    crops: dict[int, tuple[Tensor, ...]] = {}  # 2 x [1, 3, S, S], [1, 2, 5]
    for _ in range(loader.steps_per_epoch):
        batch = next(loader)
        if int(batch.sample_id) == int(batch.group_id):  # one picture a concept
            crops[int(batch.sample_id)] = (*batch.global_views[:2], batch.boxes)
    loader.close()
    group = sorted(crops)
    *views, boxes = map(torch.cat, zip(*(crops[i] for i in group), strict=True))
    return tuple(views), boxes, torch.tensor(group)


def _scenes(
    models: Mapping[str, MutualInformation],
    sources: Container[str],  # whose results are computed
    cfg: TrainConfig,
    split: str,
    batch_size: int,
) -> dict[str, DenseResult]:
    """Probe patches of scenes of several drawings, the same ones for every run on the same data."""
    device = resolve_device(cfg.device)
    sets = build_scenes(
        *(
            labelled_drawings(_whole_pictures(cfg, name, batch_size), 4 * NUM_SCENES)
            for name in (cfg.data.split, split)
        ),
        grid=cfg.vision.grid,
    )

    with autocast(cfg.precision, device):
        results = {
            who: probe_scenes(sets, partial(_patch_tokens, model), device)
            for who, model in models.items()
        }
        if "pixels" in sources:
            pixels = partial(patch_pixels, grid=cfg.vision.grid)
            results["pixels"] = probe_scenes(sets, pixels, device)
    if "chance" in sources:
        results["chance"] = guess_scenes(sets)
    return results


def _patch_tokens(model: MutualInformation, views: Tensor) -> Tensor:  # -> [B, N, C]
    return model.embed_images(views)[0]


def _features(
    objective: MutualInformation, cfg: TrainConfig, split: str, batch_size: int
) -> tuple[Features, Features]:
    """Return features of training and held-out pictures, one a concept: classes weigh alike."""
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


def _whole_pictures(
    cfg: TrainConfig,
    split: str,
    batch_size: int,
    *,
    image_size: int | None = None,
    variants: bool = False,
) -> Iterator[Batch]:
    """Yield one picture a concept, or all `variants`, in the shards' order, at the model's size."""
    return evaluation_batches(
        cfg.data.path,
        split,
        image_size=image_size or cfg.vision.image_size,
        batch_size=batch_size,
        representatives_only=not variants,
        max_pixels=cfg.data.max_pixels,
        device_id=0 if resolve_device(cfg.device).type == "cuda" else None,
        bucket_fields_of=cfg.data,
    )
