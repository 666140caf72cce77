"""Figures of an evaluation, from arrays: which classes are taken for which, calibration, retrieval.

Legend: N pictures, K classes, Q queries, k results of a query, S side of a picture in pixels.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m3i_fast.evaluation.rows.calibration import NUM_BINS, calibrate
from m3i_fast.report.evaluations.verdict import percent
from m3i_fast.report.inputs import Picture
from m3i_fast.report.panels import CURVE_HEIGHT, LEGEND_HEIGHT, Panel, axis, legend, panel, plain
from m3i_fast.report.sample_card import printable

Labels = npt.NDArray[np.int64]

MOST_CLASSES = 24  # of a confusion matrix: of more, those with most mistakes, and the rest as one
NAME_LETTERS = 18
CELL_HEIGHT = 22
REST = "all others"
RIGHT, WRONG = (11, 111, 104), (180, 98, 45)  # the page's teal and orange
_FRAME, _GAP = 3, 4  # pixels, of a sheet


# ---- Classes -------------------------------------------------------------------------------------


def confusion_counts(
    predicted: Labels,  # [N]
    label: Labels,  # [N], -1: none
    num_classes: int,
) -> npt.NDArray[np.int64]:  # [K, K]
    """Count pictures by class (rows) and predicted class (columns); those without a class are out.

    Raises ValueError for a class that is out of range.
    """
    predicted, label = _known(predicted, label, num_classes)
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (label, predicted), 1)
    return counts


def _known(predicted: Labels, label: Labels, num_classes: int) -> tuple[Labels, Labels]:
    """Return those of pictures with a class; ValueError for a class that is out of range."""
    known = label >= 0
    predicted, label = predicted[known], label[known]
    for name, values in (("predicted", predicted), ("label", label)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(
                f"{name}: expected classes from 0 to {num_classes - 1}, got {values.min()} to "
                f"{values.max()}"
            )
    return predicted, label


def confusion_matrix(
    predicted: Labels,  # [N]
    label: Labels,  # [N], -1: none
    class_names: Sequence[str],  # K
    *,
    name: str = "confusion",
) -> Panel:
    """Return the share of each class's pictures that are taken for each class.

    Of more than MOST_CLASSES the classes with most mistakes are shown, and the rest as one. Raises
    ValueError as `confusion_counts`, and where no picture has a class.
    """
    predicted, label = _known(predicted, label, len(class_names))
    if not (total := len(label)):
        raise ValueError("label: expected at least one picture with a class, got none")
    right = int((predicted == label).sum())
    names, place, is_part = _most_mistaken(predicted, label, class_names)
    counts = confusion_counts(place[predicted], place[label], len(names))
    size = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(size, 1)
    text = [[f"{100 * share:.0f}" if share >= 0.005 else "" for share in row] for row in shares]
    few = len(names) <= 12
    written = [html.escape(name, quote=False) for name in names]  # plotly reads some tags of HTML
    trace = {
        "type": "heatmap",
        "z": [plain(row) for row in shares],
        "x": written,
        "y": written,
        "zmin": 0,
        "zmax": 1,
        "xgap": 1,
        "ygap": 1,
        "colorscale": [[0, "var(--raised)"], [1, "var(--heat)"]],
        "showscale": False,
        "customdata": counts.tolist(),
        "hovertemplate": "%{y} taken for %{x}: %{z:.1%}, %{customdata}<extra></extra>",
    }
    if few:
        trace |= {
            "text": text,
            "texttemplate": "%{text}",
            "textfont": {"size": 10, "color": "var(--ink)"},
        }
    layout = {
        "xaxis": axis(title="taken for") | {"tickangle": -90, "automargin": True},
        "yaxis": axis() | {"autorange": "reversed", "automargin": True, "fixedrange": True},
        "margin": {"l": 8, "r": 4, "t": 2, "b": 8},
    }
    layout["xaxis"] |= {"showgrid": False, "fixedrange": True, "type": "category"}
    layout["yaxis"] |= {"showgrid": False, "type": "category"}  # names may be numbers
    worst = _worst(counts, names, is_part)
    told = f"{percent(right / total)} of {total:,} pictures right"
    note = told + (f"; most often {worst}" if worst else "")
    note += f"; the {len(names) - 1} classes with most mistakes" if is_part else ""
    height = CELL_HEIGHT * len(names) + 150
    return panel(name, "Class by class", note, f"{told}. {worst}", height, [trace], layout)


def _most_mistaken(
    predicted: Labels,  # [N]
    label: Labels,  # [N]
    class_names: Sequence[str],  # K
) -> tuple[list[str], Labels, bool]:
    """Return the names to show, the place of each class there [K], and whether the last is a rest.

    Memory grows with N and K, and not with K * K.
    """
    names = [_short(printable(name)) for name in class_names]
    if len(names) <= MOST_CLASSES:
        return _unique(names), np.arange(len(names)), False
    names = _unique([REST, *names])[1:]  # a class of that name is another one
    miss = predicted != label
    both = np.concatenate([predicted[miss], label[miss]])
    wrong = np.bincount(both, minlength=len(names))
    shown = np.sort(np.argsort(-wrong, kind="stable")[: MOST_CLASSES - 1])
    place = np.full(len(names), len(shown))
    place[shown] = np.arange(len(shown))
    return [*(names[i] for i in shown), REST], place, True


def _worst(counts: npt.NDArray[np.int64], names: Sequence[str], is_part: bool) -> str:
    """Name the pair of classes with most mistakes; empty without any.

    is_part: the last one is all other classes, which is left out.
    """
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    if is_part:
        wrong[-1], wrong[:, -1] = 0, 0
    if not wrong.any():
        return ""
    row, column = divmod(int(wrong.argmax()), len(wrong))
    return (
        f"{names[row]} taken for {names[column]} ({wrong[row, column]:,} of {counts[row].sum():,})"
    )


def _short(name: str) -> str:
    return (
        name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"
    )


def _unique(names: Sequence[str]) -> list[str]:
    """Give names that are alike a number: an axis has one place a name."""
    last: dict[str, int] = {}
    found: dict[str, None] = {}
    for name in names:
        own, number = name, last.get(name, 1)
        while own in found:
            number += 1
            own = f"{name} {number}"
        last[name] = number
        found[own] = None
    return [*found]


# ---- Calibration ---------------------------------------------------------------------------------


def confidences(
    logits: npt.NDArray[np.floating],  # [N, K]
    label: Labels,  # [N], -1: none
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:  # [n] each
    """Return the confidence of the guesses of pictures with a class, and whether each is right.

    A picture's confidence is the softmax of its largest logit, in fp64.
    """
    known = label >= 0
    of = logits[known].astype(np.float64)
    of = np.exp(of - of.max(1, keepdims=True))
    return 1 / of.sum(1), of.argmax(1) == label[known]  # the largest is exp(0)


def reliability_diagram(
    confidence: npt.NDArray[np.float64],  # [n] of the predicted class
    hit: npt.NDArray[np.bool_],  # [n] whether it is right
    *,
    name: str = "calibration",
) -> Panel:
    """Return accuracy by confidence, beside the diagonal on which the two are equal.

    Bins and the expected calibration error are those of `calibrate`, which raises ValueError where
    there is no picture.
    """
    found = calibrate(confidence, hit)
    mean, accuracy, count = found.confidence, found.accuracy, found.count
    middle = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    there = count > 0
    bars = {
        "type": "bar",
        "name": "accuracy",
        "x": plain(middle[there]),
        "y": plain(accuracy[there]),
        "width": 0.9 / NUM_BINS,
        "marker": {"color": "var(--accent)", "line": {"width": 0}},
        "customdata": [
            [n, c] for n, c in zip(count[there].tolist(), plain(mean[there]), strict=True)
        ],
        "hovertemplate": "confidence %{customdata[1]:.1%}: right %{y:.1%} of %{customdata[0]:,d}"
        "<extra></extra>",
    }
    even = {
        "type": "scatter",
        "mode": "lines",
        "name": "as confident as right",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "var(--muted)", "width": 1, "dash": "dash"},
        "hoverinfo": "skip",
    }
    shares_of = (
        f"{percent(float(np.mean(confidence)))} sure and {percent(float(np.mean(hit)))} right"
    )
    told = f"expected calibration error {percent(found.error)}: {shares_of}"
    shares = {"range": [0, 1], "tickformat": ".0%", "fixedrange": True}
    layout = {
        "xaxis": axis(nticks=4, title="confidence") | shares | {"showgrid": False},
        "yaxis": axis(nticks=4) | shares,
        "legend": legend(1),
        "margin": {"l": 38, "r": 12, "t": 2 * LEGEND_HEIGHT, "b": 40},
    }
    height = CURVE_HEIGHT + 2 * LEGEND_HEIGHT
    label_text = f"Calibration: {told}, of {int(count.sum()):,} pictures"
    return panel(name, "Calibration", told, label_text, height, [bars, even], layout)


# ---- Retrieval -----------------------------------------------------------------------------------


def retrieval_sheet(
    pictures: npt.NDArray[np.uint8],  # [N, 3, S, S]
    queries: Sequence[int],  # Q rows of pictures
    found: npt.NDArray[np.int64],  # [Q, k] rows of pictures, the most similar first
    is_right: npt.NDArray[np.bool_],  # [Q, k]
) -> Picture:
    """Draw a row a query: the query, and its best pictures, framed where right, crossed where not.

    Right ones have a teal frame, wrong ones an orange one and a diagonal, so that colour is not all
    that tells them. Raises ValueError for shapes that do not fit.
    """
    if found.shape != is_right.shape or len(queries) != len(found):
        raise ValueError(
            f"found, is_right: expected [{len(queries)}, k] each, a row a query, got "
            f"{list(found.shape)} and {list(is_right.shape)}"
        )
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(
            f"pictures: expected [N, 3, S, S] uint8, got {list(pictures.shape)} {pictures.dtype}"
        )
    side = pictures.shape[-1]
    pitch = side + 2 * _FRAME + _GAP
    sheet = np.full(
        (len(queries) * pitch, (found.shape[1] + 1) * pitch + side // 4, 3), 255, np.uint8
    )
    for row, query in enumerate(queries):
        _place(sheet, pictures[query], row * pitch, 0, None)
        for column, item in enumerate(found[row], start=1):
            mark = bool(is_right[row, column - 1])
            _place(sheet, pictures[item], row * pitch, column * pitch + side // 4, mark)
    return sheet


def _place(
    sheet: Picture, picture: npt.NDArray[np.uint8], top: int, left: int, mark: bool | None
) -> None:
    side = picture.shape[-1]
    frame = sheet[top : top + side + 2 * _FRAME, left : left + side + 2 * _FRAME]
    if mark is not None:
        frame[:] = RIGHT if mark else WRONG
    inside = frame[_FRAME : _FRAME + side, _FRAME : _FRAME + side]
    inside[:] = picture.transpose(1, 2, 0)
    if mark is False:
        step = np.arange(side)
        for shift in range(-1, 2):
            inside[step, np.clip(step + shift, 0, side - 1)] = WRONG


def evenly(number: int, most: int) -> list[int]:
    """Return at most `most` of `number` rows at even steps, the first and the last among them."""
    return (
        [round(i) for i in np.linspace(0, number - 1, min(number, most)).tolist()] if number else []
    )
