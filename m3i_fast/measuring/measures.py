"""The table of measures: what each needs, whose protocol it is, and the function that measures it.

A measure is one row of `MEASURES`. To add one, write a function from `Inputs` to `Measured` and its
row; the command, the counts that are told before anything is loaded, results, intervals and the
ledger take it from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.evaluation.rows.calibration import calibrate
from m3i_fast.evaluation.rows.few_labels import (
    NUM_DRAWS,
    classify_with_few_labels,
    distinct_shares,
)
from m3i_fast.evaluation.rows.neighbours import NEIGHBOURS, TEMPERATURE, classify_by_neighbours
from m3i_fast.evaluation.rows.retrieval import RECALL_AT, recall_hits
from m3i_fast.evaluation.rows.retrieval_examples import Sides
from m3i_fast.evaluation.rows.zero_shot import classify_by_prompts, embed_classes
from m3i_fast.measuring import patches, trained
from m3i_fast.measuring.measure import (
    Inputs,
    Measure,
    Measured,
    accuracy_figure,
    accuracy_of_classes,
    error_figure,
    fitted,
    hits_of,
    mean_figure,
    no_choice,
    no_fit,
    no_labels,
    no_patches,
    no_texts,
    not_trainable,
)
from m3i_fast.measuring.shown import shown_queries
from m3i_fast.measuring.source import Source

# ---- The measures --------------------------------------------------------------------------------


def _no_captions(source: Source) -> str | None:
    """Why captions cannot be retrieved."""
    if source.measured.num_captioned < 2:
        return f"{source.measured.num_captioned} captioned pictures in {source.measured.name}"
    return None


def _classifying_feature(inputs: Inputs) -> str:
    """Return the feature that classifies: a class token that training read, else the mean."""
    by_worth = ["mean_1", "image"]
    by_worth.insert(0 if inputs.encoder.reads_class_token else 1, "class_1")
    return next(name for name in by_worth if name in inputs.measured.names)


def _knn(inputs: Inputs) -> Measured:
    train, measured = fitted(inputs), inputs.measured
    name = _classifying_feature(inputs)
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
    figures = [
        accuracy_figure(f"k = {k}", row, inputs) for k, row in zip(ks, predicted, strict=True)
    ]
    best = int(np.argmin([abs(k - 20) for k in ks]))
    return Measured(
        figures=tuple(figures),
        settings={"features": name, "temperature": TEMPERATURE, "k": ks},
        details={f"by_class, k = {ks[best]}": accuracy_of_classes(figures[best], inputs)},
        arrays={"predicted": predicted, "rows": measured.labelled},
    )


def _few_labels(inputs: Inputs) -> Measured:
    train, measured = fitted(inputs), inputs.measured
    name = _classifying_feature(inputs)
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
        each = [hits_of(draw.predicted, inputs) for draw in draws]
        figures.append(mean_figure(title, np.mean(each, axis=0), measured.labelled))
        pairs = zip(draws, each, strict=True)
        found = [calibrate(draw.confidence, hits > 0) for draw, hits in pairs]
        figures.append(
            error_figure(f"{title}, calibration error", np.mean([c.error for c in found]))
        )
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
    top1 = accuracy_figure("top 1", found.ranked[:, 0], inputs)
    figures = [top1]
    if len(settings.class_names) > found.ranked.shape[1]:  # of five classes all are among five
        hits = (found.ranked == label[:, None]).any(1).astype(np.float64)
        figures.append(mean_figure("top 5", hits, measured.labelled))
    calibration = calibrate(found.confidence, hits_of(found.ranked[:, 0], inputs) > 0)
    figures.append(error_figure("calibration error", calibration.error))
    return Measured(
        figures=tuple(figures),
        settings={
            "templates": len(settings.templates),
            "first_template": settings.templates[0],
            "classes": len(settings.class_names),
            "scale": scale,
        },
        details={"by_class": accuracy_of_classes(top1, inputs), "calibration": _bins(calibration)},
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
        "picture to caption": Sides(image, pictures, pictures, text, captions, caption_row),
        "caption to picture": Sides(text, captions, caption_row, image, pictures, pictures),
    }
    items, decoded = inputs.source.measured.items, np.flatnonzero(measured.column("valid"))
    names = [items[row].name for row in pictures]
    texts = [caption for row in decoded for caption in items[row].captions]
    examples = {
        "picture to caption": shown_queries(sides["picture to caption"], names, texts, device),
        "caption to picture": shown_queries(sides["caption to picture"], texts, names, device),
    }
    figures, arrays = [], dict[str, NDArray[Any]]()
    for title, side in sides.items():
        hits = recall_hits(*side, device=device)
        for k, row in zip(RECALL_AT, hits, strict=True):
            figures.append(mean_figure(f"{title}, recall at {k}", row, side.query_item))
        arrays[title.replace(" ", "_")] = hits
    return Measured(
        figures=tuple(figures),
        settings={"pictures": len(pictures), "captions": len(captions), "k": list(RECALL_AT)},
        details={"examples": examples},
        arrays={**arrays, "rows": pictures, "caption_row": caption_row},
    )


MEASURES: dict[str, Measure] = {
    "knn": Measure(
        title="kNN",
        protocol="weighted votes of the k nearest by cosine, temperature 0.07, top 1",
        paper="DINO, arXiv 2104.14294, section 4.1; DINOv2, arXiv 2304.07193",
        missing=no_fit,
        needs_train=True,
        measure=_knn,
    ),
    "few-labels": Measure(
        title="few labels",
        protocol="logistic regression on 1 % and 10 % of the labels of each class, mean of 3 draws",
        paper="shares of SimCLR, arXiv 2002.05709, section 6; frozen as MSN, arXiv 2204.07141",
        missing=no_fit,
        needs_train=True,
        measure=_few_labels,
    ),
    "zero-shot": Measure(
        title="zero-shot",
        protocol="nearest class by the mean of its prompts, top 1 and 5",
        paper="CLIP, arXiv 2103.00020, section 3.1.4",
        missing=no_labels,
        lacking=no_texts,
        measure=_zero_shot,
    ),
    "retrieval": Measure(
        title="retrieval",
        protocol="recall at 1, 5 and 10 both ways, any of a picture's captions, ties by chance",
        paper="Karpathy and Fei-Fei, arXiv 1412.2306; CLIP, arXiv 2103.00020",
        missing=_no_captions,
        lacking=no_texts,
        measure=_retrieval,
    ),
    "linear": Measure(
        title="linear",
        protocol="linear classifiers on several inputs at 13 rates, chosen on training rows",
        paper="DINOv2, arXiv 2304.07193, section 7.1",
        missing=no_choice,
        needs_train=True,
        takes=trained.linear_takes,
        measure=trained.linear,
    ),
    "attentive": Measure(
        title="attentive",
        protocol="a learned query over frozen tokens at 4 rates, chosen on training rows",
        paper="V-JEPA, arXiv 2404.08471",
        missing=no_choice,
        lacking=no_patches,
        needs_train=True,
        takes=trained.attentive_takes,
        measure=trained.attentive,
    ),
    "fine-tuning": Measure(
        title="fine-tuning",
        protocol="all of the encoder is trained, with mixup and CutMix; the last epoch",
        paper="MAE, arXiv 2111.06377, table 9",
        missing=no_fit,
        lacking=not_trainable,
        needs_train=True,
        takes=trained.fine_tuning_takes,
        measure=trained.fine_tuning,
    ),
    "correspondence": Measure(
        title="correspondence",
        protocol="patches of one crop are searched for in another of the same picture",
        paper="this package's own; crops as training draws them, M3I, arXiv 2211.09807",
        missing=lambda source: None,
        lacking=no_patches,
        takes=patches.correspondence_takes,
        measure=patches.correspondence,
    ),
    "segmentation": Measure(
        title="segmentation",
        protocol="batch norm and a linear layer on frozen patches, upsampled logits",
        paper="DINOv2, arXiv 2304.07193, section 7.4",
        missing=lambda source: None,
        lacking=no_patches,
        takes=patches.segmentation_takes,
        measure=patches.segmentation,
    ),
}


# ---- Helpers ------------------------------------------------------------------------------------


def _bins(calibration: Any) -> dict[str, Any]:
    bins = asdict(calibration)
    return {name: np.asarray(value).tolist() for name, value in bins.items()}


def chosen_measures(names: Sequence[str]) -> dict[str, Measure]:
    """Return the rows of the table that are asked for, for no names those that are short."""
    if names:
        return {name: row for name, row in MEASURES.items() if name in names}
    return {name: row for name, row in MEASURES.items() if row.takes is None}
