"""The table of measures: what each needs, whose protocol it is, and the function that measures it.

A measure is one row of `MEASURES`. To add one, write a function from `Inputs` to `Measured` and its
row; the command, the counts that are told before anything is loaded, results, intervals and the
ledger take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from m3i_fast.evaluation.feature_rows import Index
from m3i_fast.evaluation.rows.calibration import accuracy_by_class, calibrate
from m3i_fast.evaluation.rows.few_labels import (
    NUM_DRAWS,
    classify_with_few_labels,
    distinct_shares,
)
from m3i_fast.evaluation.rows.neighbours import NEIGHBOURS, TEMPERATURE, classify_by_neighbours
from m3i_fast.evaluation.rows.retrieval import RECALL_AT, recall_hits
from m3i_fast.evaluation.rows.zero_shot import classify_by_prompts, embed_classes
from m3i_fast.measuring.encoders.encoder import Encoder
from m3i_fast.measuring.features import SplitFeatures
from m3i_fast.measuring.source import Source


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureSettings:
    """What measures are told beside their rows."""

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    """Of prompts, with {} in the place of a class's name."""
    seed: int = 0
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a measure reads: an encoder, and its features in files."""

    encoder: Encoder
    source: Source
    train: SplitFeatures | None
    """Of labelled rows that classifiers are fitted to."""
    measured: SplitFeatures
    settings: MeasureSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A figure in 0..1, and item by item what it is the mean of, where it is one."""

    name: str
    value: float
    hits: NDArray[np.float64] | None = None  # [n] in 0..1
    rows: Index | None = None  # [n] the row that each is of
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a measure found."""

    figures: tuple[Figure, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """All that the figures depend on beside features; JSON-able."""
    details: dict[str, Any] = field(default_factory=dict)
    """More of the figures: by class, by bin; JSON-able."""
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    """What plots are drawn of, by the name of its .npy file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A row of the table."""

    title: str
    protocol: str
    paper: str
    missing: Callable[[Source], str | None]
    """From the counts alone, why the data cannot be measured so; None: they can."""
    needs_train: bool = False
    """Whether it reads features of the training rows."""
    needs_text: bool = False
    """Whether the encoder has to embed texts."""
    measure: Callable[[Inputs], Measured]


# ---- What the data must have ---------------------------------------------------------------------


def _no_labels(source: Source) -> str | None:
    """Why labels of the measured split cannot be measured by."""
    if source.measured.num_labelled == 0:
        return f"no labels in {source.measured.name}"
    classes = {*source.measured.classes, *(source.train.classes if source.train else ())}
    if len(classes) < 2:
        return "one class alone: nothing to tell apart"
    return None


def _no_fit(source: Source) -> str | None:
    """Why no classifier can be fitted."""
    if (reason := _no_labels(source)) is not None:
        return reason
    if source.train is None:
        return "no labelled rows to fit to: name them by --train-split"
    if len(source.train.classes) < 2:
        return f"one class alone in {source.train.name}: nothing to fit"
    return None


def _no_captions(source: Source) -> str | None:
    """Why captions cannot be retrieved."""
    if source.measured.num_captioned < 2:
        return f"{source.measured.num_captioned} captioned pictures in {source.measured.name}"
    return None


# ---- The measures --------------------------------------------------------------------------------


def _knn(inputs: Inputs) -> Measured:
    train, measured = _fitted(inputs), inputs.measured
    name = measured.classifying_feature
    ks = [k for k in NEIGHBOURS if k <= len(train.labelled)] or [len(train.labelled)]
    predicted = classify_by_neighbours(
        train.rows(name),
        train.labelled,
        train.column("label")[train.labelled],
        measured.rows(name),
        measured.labelled,
        ks=ks,
        device=inputs.settings.device,
    )
    figures = [_accuracy(f"k = {k}", row, inputs) for k, row in zip(ks, predicted, strict=True)]
    best = int(np.argmin([abs(k - 20) for k in ks]))
    return Measured(
        figures=tuple(figures),
        settings={"features": name, "temperature": TEMPERATURE, "k": ks},
        details={f"by_class, k = {ks[best]}": _by_class(figures[best], inputs)},
        arrays={"predicted": predicted, "rows": measured.labelled},
    )


def _few_labels(inputs: Inputs) -> Measured:
    train, measured = _fitted(inputs), inputs.measured
    name = measured.classifying_feature
    figures, details, arrays = [], dict[str, Any](), {"rows": measured.labelled}
    for share in distinct_shares(train.column("label")[train.labelled]):
        draws = [
            classify_with_few_labels(
                train.rows(name),
                train.labelled,
                train.column("label")[train.labelled],
                measured.rows(name),
                measured.labelled,
                share=share,
                seed=inputs.settings.seed * NUM_DRAWS + draw,
                device=inputs.settings.device,
            )
            for draw in range(NUM_DRAWS)
        ]
        title = f"{share:.0%}"
        each = [_hits(draw.predicted, inputs) for draw in draws]
        figures.append(_mean_of(title, np.mean(each, axis=0), measured.labelled))
        pairs = zip(draws, each, strict=True)
        found = [calibrate(draw.confidence, hits > 0) for draw, hits in pairs]
        figures.append(_error(f"{title}, calibration error", np.mean([c.error for c in found])))
        details[title] = {
            "rows": [len(draw.rows) for draw in draws],
            "l2": [draw.l2 for draw in draws],
            "accuracy": [float(hits.mean()) for hits in each],
            "calibration": _bins(found[0]),
        }
        arrays[f"predicted_{share:g}"] = np.stack([draw.predicted for draw in draws])
        arrays[f"confidence_{share:g}"] = np.stack([draw.confidence for draw in draws])
    return Measured(
        figures=tuple(figures),
        settings={"features": name, "draws": NUM_DRAWS, "seed": inputs.settings.seed},
        details=details,
        arrays=arrays,
    )


def _zero_shot(inputs: Inputs) -> Measured:
    settings, measured, encoder = inputs.settings, inputs.measured, inputs.encoder
    classes = embed_classes(encoder.encode_texts, settings.class_names, settings.templates)
    scale = encoder.logit_scale or 1.0
    found = classify_by_prompts(
        measured.rows("image"), measured.labelled, classes, scale=scale, device=settings.device
    )
    label = measured.column("label")[measured.labelled]
    top1 = _accuracy("top 1", found.ranked[:, 0], inputs)
    figures = [top1]
    if found.ranked.shape[1] == 5:
        hits = (found.ranked == label[:, None]).any(1).astype(np.float64)
        figures.append(_mean_of("top 5", hits, measured.labelled))
    calibration = calibrate(found.confidence, _hits(found.ranked[:, 0], inputs) > 0)
    figures.append(_error("calibration error", calibration.error))
    return Measured(
        figures=tuple(figures),
        settings={
            "templates": len(settings.templates),
            "first_template": settings.templates[0],
            "classes": len(settings.class_names),
            "scale": scale,
        },
        details={"by_class": _by_class(top1, inputs), "calibration": _bins(calibration)},
        arrays={
            "predicted": found.ranked[:, 0],
            "confidence": found.confidence,
            "rows": measured.labelled,
        },
    )


def _retrieval(inputs: Inputs) -> Measured:
    measured, device = inputs.measured, inputs.settings.device
    caption_row = measured.column("caption_row")
    pictures, captions = np.unique(caption_row), np.arange(len(caption_row))
    image, text = measured.rows("image"), measured.rows("text")
    sides = {
        "picture to caption": (image, pictures, pictures, text, captions, caption_row),
        "caption to picture": (text, captions, caption_row, image, pictures, pictures),
    }
    figures, arrays = [], dict[str, NDArray[Any]]()
    for title, side in sides.items():
        hits = recall_hits(*side, device=device)
        for k, row in zip(RECALL_AT, hits, strict=True):
            figures.append(_mean_of(f"{title}, recall at {k}", row, side[2]))
        arrays[title.replace(" ", "_")] = hits
    return Measured(
        figures=tuple(figures),
        settings={"pictures": len(pictures), "captions": len(captions), "k": list(RECALL_AT)},
        arrays={**arrays, "rows": pictures, "caption_row": caption_row},
    )


MEASURES: dict[str, Measure] = {
    "knn": Measure(
        title="kNN",
        protocol="weighted votes of the k nearest by cosine, temperature 0.07, top 1",
        paper="DINO, arXiv 2104.14294, section 4.1; DINOv2, arXiv 2304.07193",
        missing=_no_fit,
        needs_train=True,
        measure=_knn,
    ),
    "few-labels": Measure(
        title="few labels",
        protocol="logistic regression on 1 % and 10 % of the labels of each class, mean of 3 draws",
        paper="shares of SimCLR, arXiv 2002.05709, section 6; frozen as MSN, arXiv 2204.07141",
        missing=_no_fit,
        needs_train=True,
        measure=_few_labels,
    ),
    "zero-shot": Measure(
        title="zero-shot",
        protocol="nearest class by the mean of its prompts, top 1 and 5",
        paper="CLIP, arXiv 2103.00020, section 3.1.4",
        missing=_no_labels,
        needs_text=True,
        measure=_zero_shot,
    ),
    "retrieval": Measure(
        title="retrieval",
        protocol="recall at 1, 5 and 10 both ways, any of a picture's captions, ties by chance",
        paper="Karpathy and Fei-Fei, arXiv 1412.2306; CLIP, arXiv 2103.00020",
        missing=_no_captions,
        needs_text=True,
        measure=_retrieval,
    ),
}


# ---- Helpers -------------------------------------------------------------------------------------


def _fitted(inputs: Inputs) -> SplitFeatures:
    assert inputs.train is not None, "a measure whose data lack labels is not run"
    return inputs.train


def _accuracy(name: str, predicted: Index, inputs: Inputs) -> Figure:
    return _mean_of(name, _hits(predicted, inputs), inputs.measured.labelled)


def _hits(predicted: Index, inputs: Inputs) -> NDArray[np.float64]:
    """Return 1 for each labelled row that is predicted right, else 0."""
    label = inputs.measured.column("label")[inputs.measured.labelled]
    return (predicted == label).astype(np.float64)


def _mean_of(name: str, hits: NDArray[np.float64], rows: Index) -> Figure:
    return Figure(name=name, value=float(hits.mean()), hits=hits, rows=rows)


def _error(name: str, value: Any) -> Figure:
    return Figure(name=name, value=float(value), higher_is_better=False)


def _by_class(figure: Figure, inputs: Inputs) -> dict[str, float]:
    """Return the accuracy of each class that has measured rows, by name."""
    names = inputs.settings.class_names
    label = inputs.measured.column("label")[inputs.measured.labelled]
    assert figure.hits is not None
    accuracy = accuracy_by_class(figure.hits, label, len(names))
    return {names[i]: float(accuracy[i]) for i in np.unique(label)}


def _bins(calibration: Any) -> dict[str, Any]:
    bins = asdict(calibration)
    return {name: np.asarray(value).tolist() for name, value in bins.items()}


def chosen_measures(names: Sequence[str]) -> dict[str, Measure]:
    """Return the rows of the table that are asked for, all of them for no names."""
    return {name: row for name, row in MEASURES.items() if not names or name in names}
