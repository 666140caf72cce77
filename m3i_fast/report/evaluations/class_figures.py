"""Which classes are taken for which by a measure, and how often it is right where it is sure.

Legend: n labelled rows that were measured, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from m3i_fast.report.evaluations.plots import confusion_matrix, reliability_diagram
from m3i_fast.report.inputs import DataEvaluation
from m3i_fast.report.panels import Panel

USUAL_K = 20  # of kNN, as DINO reports it


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a measure says of rows; several draws stand one after another."""

    measure: str
    title: str
    predicted: npt.NDArray[np.int64]  # [n]
    label: npt.NDArray[np.int64]  # [n]
    confidence: npt.NDArray[np.float64] | None  # [n], None: the measure has no probabilities


def class_figures(evaluation: DataEvaluation, *, prefix: str) -> list[Panel]:
    """Return the figures of every measure of the first encoder that predicts classes.

    prefix: of their ids.
    """
    panels = []
    for of in predictions(evaluation):
        own = f"{prefix}-{of.measure}"
        drawn = [
            confusion_matrix(
                of.predicted, of.label, evaluation.class_names, name=f"{own}-confusion"
            )
        ]
        if of.confidence is not None:
            hit = of.predicted == of.label
            drawn.append(reliability_diagram(of.confidence, hit, name=f"{own}-calibration"))
        panels += [replace(each, title=f"{of.title}: {each.title.lower()}") for each in drawn]
    return panels


def predictions(evaluation: DataEvaluation) -> Iterator[Predictions]:
    """Yield what each measure of the first encoder predicts of the rows with a label."""
    if evaluation.label is None:
        return
    arrays = evaluation.arrays[0]
    for measure, measured in evaluation.results["encoders"][0]["measures"].items():
        rows = arrays.get(f"{measure}.rows")
        chosen = _chosen(measure, measured, arrays)
        if rows is None or chosen is None:
            continue
        told, predicted, confidence = chosen
        predicted = np.atleast_2d(predicted)  # [draws, n]
        label = np.broadcast_to(evaluation.label[rows], predicted.shape)
        title = measured.get("title", measure)
        yield Predictions(
            measure=measure,
            title=f"{title}, {told}" if told else title,
            predicted=predicted.reshape(-1),
            label=label.reshape(-1),
            confidence=None if confidence is None else confidence.reshape(-1),
        )


def _chosen(
    measure: str, measured: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]
) -> tuple[str, npt.NDArray[Any], npt.NDArray[Any] | None] | None:
    """Return which of a measure's predictions is shown, those, and their confidence."""
    if measure == "knn":
        ks = measured["settings"]["k"]
        place = min(range(len(ks)), key=lambda i: abs(ks[i] - USUAL_K))
        return f"k = {ks[place]}", arrays["knn.predicted"][place], None
    if measure == "few-labels":
        begins = "few-labels.predicted_"
        shares = [name.removeprefix(begins) for name in arrays if name.startswith(begins)]
        share = max(shares, key=float)
        draws = arrays[begins + share]  # [draws, n]
        told = f"{float(share):.0%}, {len(draws)} draws together"
        return told, draws, arrays[f"few-labels.confidence_{share}"]
    predicted = arrays.get(f"{measure}.predicted")
    return None if predicted is None else ("", predicted, arrays.get(f"{measure}.confidence"))
