"""Lines of the terms stand where their values say; oracle: the values, read back by the marks."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from m3i_fast.benchmarks.one_stage.term_plot import StageTerms, draw_terms

SVG = "{http://www.w3.org/2000/svg}"
FIRST = StageTerms(
    share=0.7,
    gradient={"features": [0.01, 0.1, 1.0, 10.0, 1.0]},
    explained={"features": [-0.25, 0.0, 0.25, 0.5, 0.75]},
)
SECOND = StageTerms(
    share=0.3,
    gradient={"caption": [1.0, None, 0.0, 1.0, 0.01], "category": [1.0] * 5},
    explained={},
)
DRAWN = draw_terms({"styles": {"two & more": [FIRST, SECOND], "clip": [SECOND]}}, "title")


def lines() -> dict[str, list[tuple[float, float]]]:
    """Tip -> places of a line's points."""
    found = {}
    for node in ElementTree.fromstring(DRAWN).iter(f"{SVG}path"):
        if len(node):
            points = [point.split() for point in node.attrib["d"][1:].split("L")]
            found[str(node[0].text)] = [(float(x), float(y)) for x, y in points]
    return found


def marks(after: str) -> dict[float, float]:
    """Number -> its height, of the axis below the words `after`."""
    texts = [*ElementTree.fromstring(DRAWN).iter(f"{SVG}text")]
    first = next(i for i, node in enumerate(texts) if node.text == after) + 1
    found = {}
    for node in texts[first:]:
        if node.attrib["text-anchor"] != "end":
            break
        found[float(str(node.text))] = float(node.attrib["y"]) - 4
    return found


def test_gradients_stand_on_a_logarithmic_axis() -> None:
    axis = marks("styles: pull on the encoder")
    assert list(axis) == [0.01, 0.1, 1.0, 10.0]
    places = lines()["two & more, features: 0.01, 0.1, 1, 10, 1"]
    for (_, y), value in zip(places, FIRST.gradient["features"], strict=True):
        assert value is not None and y == pytest.approx(axis[value], abs=0.1)


def test_explained_variance_stands_on_a_linear_axis() -> None:
    axis = marks("styles: variance explained")
    assert 0.0 in axis
    low, high = min(axis), max(axis)
    places = lines()["two & more, features: -0.25, 0, 0.25, 0.5, 0.75"]
    for (_, y), value in zip(places, FIRST.explained["features"], strict=True):
        share = (float(value or 0) - low) / (high - low)
        assert y == pytest.approx(axis[low] + share * (axis[high] - axis[low]), abs=0.1)


def test_stages_stand_one_after_the_other_and_gaps_are_left_out() -> None:
    found = lines()
    first = [x for x, _ in found["two & more, features: 0.01, 0.1, 1, 10, 1"]]
    second = [x for x, _ in found["two & more, category: 1, 1, 1, 1, 1"]]
    step = (first[-1] - first[0]) / (0.7 * 4 / 5)  # of the whole time
    assert second[0] - first[0] == pytest.approx(step * (0.7 + 0.03 - 0.07), abs=0.3)
    assert second[-1] - second[0] == pytest.approx(step * 0.3 * 4 / 5, abs=0.3)
    gaps = [x for x, _ in found["two & more, caption: 1, 1, 0.01"]]
    assert gaps == pytest.approx([second[0], second[3], second[4]], abs=0.1)


def test_an_arm_without_dense_terms_has_no_panel_of_variance() -> None:
    names = [node.text for node in ElementTree.fromstring(DRAWN).iter(f"{SVG}text")]
    assert names.count("two & more") == 2 and names.count("clip") == 1


def test_no_names_lie_on_each_other_and_all_inside() -> None:
    root = ElementTree.fromstring(DRAWN)
    places = [
        (float(node.attrib["x"]), float(node.attrib["y"])) for node in root.iter(f"{SVG}text")
    ]
    for i, (x, y) in enumerate(places):
        assert 0 <= x <= float(root.attrib["width"]) and 0 <= y <= float(root.attrib["height"])
        assert all(math.dist((x, y), other) > 10 for other in places[:i])


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="sets: expected at least one stage, got none"):
        draw_terms({"styles": {"clip": []}}, "title")
