"""Figures of an evaluation against scikit-learn's counts, and what they say."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.calibration import calibration_curve

from m3i_fast.evaluation.rows.calibration import NUM_BINS
from m3i_fast.report.evaluations.plots import (
    MOST_CLASSES,
    REST,
    RIGHT,
    WRONG,
    confidences,
    confusion_counts,
    confusion_matrix,
    evenly,
    reliability_diagram,
    retrieval_sheet,
)

RNG = np.random.default_rng(0)


def drawn(num: int, num_classes: int, *, sure: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels of which a fifth is unknown."""
    label = RNG.integers(0, num_classes, num)
    logits = sure * RNG.normal(size=(num, num_classes)) + 2 * np.eye(num_classes)[label]
    label[::5] = -1
    return logits.astype(np.float32), label


@pytest.mark.parametrize("num_classes", [2, 5, 40])
def test_confusion_equals_scikit_learn(num_classes: int) -> None:
    logits, label = drawn(500, num_classes, sure=1.0)
    known, predicted = label >= 0, logits.argmax(1)
    expected = metrics.confusion_matrix(label[known], predicted[known], labels=range(num_classes))
    counts = confusion_counts(predicted, label, num_classes)
    np.testing.assert_array_equal(counts, expected)


def test_a_confusion_matrix_shows_shares_of_each_class() -> None:
    label = np.array([0, 0, 0, 0, 1, 1, -1])
    predicted = np.array([0, 0, 0, 1, 1, 0, 1])
    panel = confusion_matrix(predicted, label, ("cat", "dog"))
    (trace,) = panel.figure["data"]
    assert trace["z"] == [[0.75, 0.25], [0.5, 0.5]] and trace["y"] == ["cat", "dog"]
    assert trace["customdata"] == [[3, 1], [1, 1]]
    assert panel.note == "66.7% of 6 pictures right; most often cat taken for dog (1 of 4)"
    json.dumps(panel.figure, allow_nan=False)


def test_of_many_classes_those_with_most_mistakes_are_shown_and_the_rest_is_one() -> None:
    logits, label = drawn(4000, 60, sure=0.6)
    predicted = logits.argmax(1)
    names = [f"class {i}" for i in range(60)]
    (trace,) = confusion_matrix(predicted, label, names).figure["data"]
    shown = trace["y"]
    assert len(shown) == MOST_CLASSES and shown[-1] == REST
    counts = np.array(trace["customdata"])
    full = confusion_counts(predicted, label, 60)
    assert counts.sum() == full.sum()
    mistakes = full.sum(0) + full.sum(1) - 2 * full.diagonal()
    rows = [names.index(name) for name in shown[:-1]]
    others = [i for i in range(60) if i not in rows]
    assert mistakes[rows].min() >= mistakes[others].max()
    np.testing.assert_array_equal(counts[:-1, :-1], full[np.ix_(rows, rows)])
    assert counts[-1, -1] == full[np.ix_(others, others)].sum()


def test_a_matrix_of_very_many_classes_is_that_of_scikit_learn() -> None:
    """Of 200,000 classes, whose matrix would take 300 GB."""
    number = 200_000
    label = RNG.integers(0, number, 5000)
    predicted = np.where(RNG.random(5000) < 0.5, label, label[0])
    (trace,) = confusion_matrix(predicted, label, [str(i) for i in range(number)]).figure["data"]
    rows = np.array([int(name) for name in trace["y"][:-1]])
    place = {int(row): i for i, row in enumerate(rows)}
    merged = [[place.get(int(i), len(rows)) for i in of] for of in (label, predicted)]
    np.testing.assert_array_equal(trace["customdata"], metrics.confusion_matrix(*merged))
    assert label[0] in rows


def test_names_that_are_alike_have_a_row_each() -> None:
    names = (
        "a name of more than eighteen letters",
        "a name of more than nineteen letters",
        "a name",
    )
    (trace,) = confusion_matrix(np.array([0, 1, 2]), np.array([0, 1, 2]), names).figure["data"]
    assert len(set(trace["y"])) == 3 and all(len(name) <= 20 for name in trace["y"])


def test_names_are_text_and_each_has_a_place_of_its_own() -> None:
    """Numbers, tags, marks of direction, and names that look like numbered ones."""
    names = ("10", "2", "<b>&", "\u202eleft", "a", "a", "a 2", "a")
    rows = np.arange(len(names))
    drawn = confusion_matrix(rows, rows, names).figure
    (trace,) = drawn["data"]
    assert trace["y"][:4] == ["10", "2", "&lt;b&gt;&amp;", "\N{REPLACEMENT CHARACTER}left"]
    assert trace["x"] == trace["y"] and len(set(trace["y"])) == len(names)
    assert {drawn["layout"][each]["type"] for each in ("xaxis", "yaxis")} == {"category"}


@pytest.mark.parametrize("num_classes", [3, MOST_CLASSES + 5])
def test_a_class_that_is_called_all_others_is_a_class(num_classes: int) -> None:
    names = [f"class {i}" for i in range(num_classes - 1)] + [REST]
    label = np.arange(num_classes).repeat(3)
    predicted = label.copy()
    predicted[-2:] = 0  # of the class called so
    panel = confusion_matrix(predicted, label, names)
    (trace,) = panel.figure["data"]
    assert len(set(trace["y"])) == min(num_classes, MOST_CLASSES)
    assert f"most often {REST}" in panel.note and "taken for class 0 (2 of 3)" in panel.note


@pytest.mark.parametrize("sure", [0.3, 1.0, 4.0])
def test_what_a_reliability_diagram_draws_is_scikit_learns_curve(sure: float) -> None:
    logits, label = drawn(3000, 7, sure=sure)
    known = label >= 0
    confidence, hit = confidences(logits, label)
    most, predicted = torch.tensor(logits[known]).double().softmax(1).max(1)
    np.testing.assert_allclose(confidence, most)
    np.testing.assert_array_equal(hit, predicted.numpy() == label[known])
    bars, even = reliability_diagram(confidence, hit).figure["data"]
    share, sure_of = calibration_curve(hit, confidence, n_bins=NUM_BINS)
    np.testing.assert_allclose(bars["y"], share, rtol=1e-5)
    counts, means = zip(*bars["customdata"], strict=True)
    np.testing.assert_allclose(means, sure_of, rtol=1e-5)
    assert sum(counts) == known.sum()
    assert np.abs(np.array(bars["x"]) - sure_of).max() <= 0.5 / NUM_BINS + 1e-6
    assert even["x"] == even["y"] == [0, 1]


def test_a_head_that_is_always_sure_and_half_right_is_told_so() -> None:
    logits, label = np.array([[99.0, 0.0], [99.0, 0.0]], np.float32), np.array([0, 1])
    panel = reliability_diagram(*confidences(logits, label))
    assert panel.note == "expected calibration error 50.0%: 100.0% sure and 50.0% right"
    bars = panel.figure["data"][0]
    assert bars["y"] == [0.5] and bars["x"] == [pytest.approx(1 - 0.5 / NUM_BINS)]
    json.dumps(panel.figure, allow_nan=False)


def test_a_sheet_has_each_picture_at_its_place_marked_right_or_wrong() -> None:
    pictures = RNG.integers(0, 200, (5, 3, 16, 16)).astype(np.uint8)
    is_right = np.array([[True, False], [False, True]])
    sheet = retrieval_sheet(pictures, [0, 4], np.array([[1, 2], [3, 0]]), is_right)
    pitch = 16 + 2 * 3 + 4
    assert sheet.shape == (2 * pitch, 3 * pitch + 4, 3)
    for row, query in enumerate((0, 4)):
        top = row * pitch + 3
        np.testing.assert_array_equal(
            sheet[top : top + 16, 3:19], pictures[query].transpose(1, 2, 0)
        )
        for column, right in enumerate(is_right[row], start=1):
            left = column * pitch + 4
            assert tuple(sheet[row * pitch, left]) == (RIGHT if right else WRONG)
            inside = sheet[top : top + 16, left + 3 : left + 19]
            crossed = (inside[np.arange(16), np.arange(16)] == WRONG).all()
            assert crossed == (not right)
    kept = sheet[3:19, pitch + 7 : pitch + 23]
    np.testing.assert_array_equal(kept, pictures[1].transpose(1, 2, 0))


def test_rows_are_taken_at_even_steps() -> None:
    assert evenly(10, 4) == [0, 3, 6, 9] and evenly(2, 4) == [0, 1] and evenly(0, 4) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion_counts(np.array([2]), np.array([0]), 2), "predicted: .* 0 to 1, got 2"),
        (lambda: confusion_matrix(np.array([0]), np.array([-1]), ("a",)), "at least one picture"),
        (lambda: reliability_diagram(np.zeros(0), np.zeros(0, bool)), "one a prediction, got 0"),
        (
            lambda: retrieval_sheet(
                np.zeros((1, 3, 8, 8), np.uint8), [0], np.zeros((2, 1), int), np.ones((2, 1), bool)
            ),
            r"expected \[1, k\] each",
        ),
        (
            lambda: retrieval_sheet(
                np.zeros((1, 8, 8, 3)), [0], np.zeros((1, 1), int), np.ones((1, 1), bool)
            ),
            r"expected \[N, 3, S, S\] uint8",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
