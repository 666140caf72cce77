"""Measures encoders on pictures: tells what can be measured, encodes once, measures from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_fast.engine.parallel.ranks import World
from m3i_fast.evaluation.feature_rows import Index
from m3i_fast.measuring.encoders.encoder import Encoder, EncoderSettings
from m3i_fast.measuring.encoders.opening import open_encoder, split_spec
from m3i_fast.measuring.features import ExtractionSettings, SplitFeatures, extract, num_rows
from m3i_fast.measuring.measure import (
    Figure,
    Inputs,
    Measure,
    MeasureSettings,
    TrainingSettings,
)
from m3i_fast.measuring.measures import MEASURES, chosen_measures
from m3i_fast.measuring.patches import expect_segmentation
from m3i_fast.measuring.results import EncoderResults, Results, slug
from m3i_fast.measuring.shown import SIDE, patch_colours, rows_of, squares
from m3i_fast.measuring.source import Source, SourceSettings, Split, read_source
from m3i_fast.pipelines.optional_imports import require

DEFAULT_TEMPLATES = "OPENAI_IMAGENET_TEMPLATES"  # of open_clip, CLIP's eighty for ImageNet
Told = Callable[[str], None]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Kept = Callable[[Results], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What is measured, on what, and how it is computed."""

    model: str
    baselines: tuple[str, ...] = ()
    source: SourceSettings
    measures: tuple[str, ...] = ()
    """Names of `MEASURES`; none: all short ones that the data and the encoder allow."""
    templates: tuple[str, ...] = ()
    """Of prompts; none: CLIP's eighty for ImageNet, which open_clip has."""
    dtype: torch.dtype | None = None
    allow_download: bool = False
    extraction: ExtractionSettings
    training: TrainingSettings = TrainingSettings()
    segmentation: Path | None = None
    """Folder of pictures and masks, as ADE20k or VOC, that is segmented beside the rest."""
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.measures if name not in MEASURES]:
            raise ValueError(
                f"--measures: expected some of {', '.join(MEASURES)}, got {unknown[0]}"
            )
        if "segmentation" in self.measures and self.segmentation is None:
            raise ValueError("--segmentation: expected a folder of pictures and masks, got none")
        if wrong := [text for text in self.templates if "{}" not in text]:
            raise ValueError(
                f"--templates: expected {{}} in each line, in the place of a class's name, got "
                f"{wrong[0]!r}"
            )
        names = (self.model, *self.baselines)
        if len(set(names)) < len(names):
            raise ValueError("--baseline: expected other encoders than MODEL, got one twice")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the data allow to measure, before any picture or weight is read."""

    source: Source
    measures: Mapping[str, Measure] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


def no_bar(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Show no progress."""
    return nullcontext(lambda number: None)


def plan(settings: EvaluationSettings) -> Plan:
    """List the data and say which measures they allow.

    Raises ValueError for data that allow none, for a measure that was asked for and that they do
    not allow, and as `read_source`.
    """
    source = read_source(settings.source)
    asked = chosen_measures(settings.measures)
    if settings.segmentation is not None:
        expect_segmentation(settings.segmentation)
        asked["segmentation"] = MEASURES["segmentation"]
    missing = {name: row.missing(source) for name, row in asked.items()}
    left_out = {name: reason for name, reason in missing.items() if reason is not None}
    if settings.measures and left_out:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"--measures {name}: {reason} ({settings.source.path})")
    if len(left_out) == len(asked):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"--data {settings.source.path}: nothing to measure: {reasons}")
    kept = {name: row for name, row in asked.items() if name not in left_out}
    return Plan(source=source, measures=kept, left_out=left_out)


def evaluate(
    settings: EvaluationSettings,
    planned: Plan,
    world: World,
    *,
    tell: Told = lambda text: None,
    bar: Bar = no_bar,
    keep: Kept = lambda results: None,
) -> Results | None:
    """Measure the encoder and its baselines on the same rows; None on ranks other than the first.

    All ranks compute features; the first measures. Encoders are opened one after the other, so
    that one is in memory at a time. keep: called after each measure with the figures so far.
    """
    results = Results(source=planned.source, encoders=(), settings=_recorded(settings))
    for spec in (settings.model, *settings.baselines):
        before = results
        for found in _evaluate_one(spec, settings, planned, world, tell, bar):
            results = replace(
                before,
                encoders=[*before.encoders, found.results],
                faults={**before.faults, **found.faults},
                shared_pictures=before.shared_pictures or found.shared_pictures,
            )
            keep(results)
    if not world.is_main:
        return None
    rows, pictures = _shown(planned.source, results.encoders)
    return replace(results, picture_rows=rows, pictures=pictures)


def _shown(
    source: Source, results: Sequence[EncoderResults]
) -> tuple[Index, NDArray[np.uint8]]:  # [n], [n, 3, S, S]
    """Return the pictures of the patches of all encoders, and of the first one's retrieval."""
    retrieval = results[0].measured.get("retrieval")
    rows = rows_of(retrieval.details["examples"]) if retrieval else set[int]()
    rows |= {row for one in results if one.patches for row in one.patches["rows"].tolist()}
    return squares(source, sorted(rows), side=SIDE)


class _Found(NamedTuple):
    """What one encoder was measured to have, and what was found of the pictures on the way."""

    results: EncoderResults
    faults: dict[str, str]
    shared_pictures: list[tuple[str, str]]


def _evaluate_one(
    spec: str,
    settings: EvaluationSettings,
    planned: Plan,
    world: World,
    tell: Told,
    bar: Bar,
) -> Iterator[_Found]:
    """Open an encoder, compute the features that its measures read, and on the first rank measure.

    Yields what was found so far after each measure, at last all of it; nothing on other ranks, and
    of a baseline of which nothing can be measured.
    """
    source = planned.source
    opened = EncoderSettings(
        device=world.device, dtype=settings.dtype, allow_download=settings.allow_download
    )
    encoder = open_encoder(spec, opened)
    measures, left_out = _for_encoder(spec, encoder, settings, planned)
    if not measures:
        tell(f"{spec}: left out: {'; '.join(left_out.values())}")
        return

    def features(split: Split) -> SplitFeatures:
        with bar(f"{spec}: {split.name}", num_rows(split, world)) as advance:
            return extract(encoder, source, split, world, settings.extraction, advance)

    needs_train = any(row.needs_train for row in measures.values())
    train = features(source.train) if source.train is not None and needs_train else None
    measured = features(source.measured)
    if not world.is_main:
        return
    broken = _left_by_broken(source, train, measured, measures)
    measures = {name: row for name, row in measures.items() if name not in broken}
    left_out |= broken
    _expect_any(spec, settings, measures, left_out)
    if not measures:
        tell(f"{spec}: left out: {'; '.join(left_out.values())}")
        return
    inputs = Inputs(
        encoder=encoder,
        source=source,
        train=train,
        measured=measured,
        settings=_measure_settings(settings, planned, world),
    )
    faults = {**(train.faults if train is not None else {}), **measured.faults}
    shared = shared_pictures(train, measured)
    for results in _measure(spec, inputs, measures, left_out, tell):
        yield _Found(results, faults, shared)


def shared_pictures(train: SplitFeatures | None, measured: SplitFeatures) -> list[tuple[str, str]]:
    """Return (measured, training) names of pictures of the same bytes."""
    if train is None:
        return []
    known = {
        digest.tobytes(): row for row, digest in enumerate(train.column("picture")) if digest.any()
    }
    return [
        (measured.split.items[row].name, train.split.items[known[digest.tobytes()]].name)
        for row, digest in enumerate(measured.column("picture"))
        if digest.tobytes() in known
    ]


def missing_classes(source: Source) -> tuple[list[str], int]:
    """Return the classes with measured rows and without training rows, and how many rows."""
    if source.train is None:
        return [], 0
    absent = np.setdiff1d(source.measured.classes, source.train.classes)
    rows = int(np.isin(source.measured.label, absent).sum())
    return [source.class_names[i] for i in absent], rows


def _for_encoder(
    spec: str, encoder: Encoder, settings: EvaluationSettings, planned: Plan
) -> tuple[dict[str, Measure], dict[str, str]]:
    """Return the measures of an encoder, and why the others are left out.

    Raises ValueError where the one that is measured cannot be measured as was asked.
    """
    left_out = dict(planned.left_out)
    for name, row in planned.measures.items():
        if (reason := row.lacking(encoder)) is not None:
            left_out[name] = reason
    measures = {name: row for name, row in planned.measures.items() if name not in left_out}
    _expect_any(spec, settings, measures, left_out)
    return measures, left_out


def _expect_any(
    spec: str,
    settings: EvaluationSettings,
    measures: Mapping[str, Measure],
    left_out: Mapping[str, str],
) -> None:
    """Raise ValueError where of MODEL nothing can be measured, or not all that was asked for."""
    if spec != settings.model or (measures and not (settings.measures and left_out)):
        return
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    if settings.measures:
        raise ValueError(f"--measures: {spec} cannot be measured as asked: {reasons}")
    raise ValueError(f"{spec}: nothing can be measured on these pictures: {reasons}")


def _left_by_broken(
    source: Source,
    train: SplitFeatures | None,
    measured: SplitFeatures,
    measures: Mapping[str, Measure],
) -> dict[str, str]:
    """Return why measures are left out for want of pictures that can be decoded."""

    def decoded(found: SplitFeatures) -> Split:
        rows = np.flatnonzero(found.column("valid"))
        items = tuple(found.split.items[row] for row in rows)
        return replace(found.split, items=items, group=found.split.group[rows])

    train_there = source.train if train is None else decoded(train)
    there = replace(source, train=train_there, measured=decoded(measured))
    reasons = {name: row.missing(there) for name, row in measures.items()}
    return {
        name: f"{reason}, of pictures that can be decoded"
        for name, reason in reasons.items()
        if reason is not None
    }


def _measure(
    spec: str,
    inputs: Inputs,
    measures: Mapping[str, Measure],
    left_out: Mapping[str, str],
    tell: Told,
) -> Iterator[EncoderResults]:
    """Yield the results so far after each measure, at last with the patches as colour."""
    encoder = inputs.encoder
    results = EncoderResults(
        name=spec,
        digest=encoder.digest,
        step=encoder.step,
        dtype=str(encoder.dtype).removeprefix("torch."),
        logit_scale=encoder.logit_scale,
        measured={},
        left_out=left_out,
    )
    for name, row in measures.items():
        if row.takes is not None:
            tell(f"{spec}: {row.title}: {row.takes(inputs.settings)}")
        measured = row.measure(inputs)
        tell(f"{spec}: {row.title}: {_told(measured.figures)}")
        results = replace(results, measured={**results.measured, name: measured})
        yield results
    yield replace(results, patches=patch_colours(inputs))


def _told(figures: Sequence[Figure]) -> str:
    """Return figures as text, in per cent as the table has them."""
    return ", ".join(f"{figure.name} {100 * figure.value:.1f}" for figure in figures)


def _measure_settings(settings: EvaluationSettings, planned: Plan, world: World) -> MeasureSettings:
    templates = settings.templates
    if "zero-shot" in planned.measures and not templates:
        library = require("open_clip", extra="shards")
        templates = tuple(template("{}") for template in getattr(library, DEFAULT_TEMPLATES))
    return MeasureSettings(
        class_names=planned.source.class_names,
        templates=templates,
        seed=settings.seed,
        device=world.device,
        batch_size=settings.extraction.batch_size,
        workers=settings.extraction.workers,
        training=settings.training,
        segmentation=settings.segmentation,
    )


def _recorded(settings: EvaluationSettings) -> dict[str, Any]:
    """Return the settings that figures depend on, JSON-able."""
    source = asdict(settings.source)
    for name in ("path", "cache_dir", "classes", "image_root"):
        del source[name]
    return {
        "model": settings.model,
        "baselines": list(settings.baselines),
        "seed": settings.seed,
        "batch_size": settings.extraction.batch_size,
        "training": asdict(settings.training),
        "source": source,
    }


def default_out(model: str) -> Path:
    """Return where results go: a folder in that of a run or an export, else one by its name."""
    path = Path(split_spec(model)[0])
    if (path / "config.json").is_file():
        return path / "evaluation"
    run = path.absolute().parent.parent
    if path.is_dir() and (run / "config.json").is_file():  # a checkpoint, which takes no more files
        return run / f"evaluation_{path.name}"
    return Path("evaluation") / slug(model)
