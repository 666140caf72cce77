"""The picture of growing budgets stands where the figures say."""

from xml.etree import ElementTree

import pytest

from m3i_fast.benchmarks.methods.growth_plot import draw_growth
from m3i_fast.benchmarks.methods.table import Line

SVG = "{http://www.w3.org/2000/svg}"
BUDGETS = ("100 steps", "300 steps", "900 steps")
VALUES = {"m3i": (40.0, 50.0, 60.0), "clip": (30.0, 50.0, 55.0)}


def _lines(index: int) -> list[Line]:
    lines = [Line(n, {"knn_top1": v[index]}, {}, []) for n, v in VALUES.items()]
    return [*lines, Line("untrained", {"knn_top1": 1.0}, {}, [])]


def test_points_stand_at_their_values_and_in_order_of_the_budgets() -> None:
    svg = draw_growth({budget: _lines(i) for i, budget in enumerate(BUDGETS)})
    root = ElementTree.fromstring(svg)
    points = {circle[0].text: circle for circle in root.iter(f"{SVG}circle")}
    assert set(points) == {f"{name}: {value:.3g}" for name, of in VALUES.items() for value in of}
    place = {tip: (float(c.get("cx", 0)), float(c.get("cy", 0))) for tip, c in points.items()}
    assert place["m3i: 40"][0] < place["m3i: 50"][0] < place["m3i: 60"][0]
    assert place["m3i: 50"] == place["clip: 50"]
    # Ten points of percent are as high wherever they are.
    heights = [place[f"m3i: {value}"][1] for value in (40, 50, 60)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert [t for t in texts if t in BUDGETS] == list(BUDGETS)
    assert {"m3i", "clip"} <= set(texts) and "untrained" not in texts


def test_names_at_the_ends_do_not_cover_each_other() -> None:
    lines = [Line(f"method {i}", {"knn_top1": 50.0 + i / 10}, {}, []) for i in range(4)]
    root = ElementTree.fromstring(draw_growth({"a": lines, "b": lines}))
    heights = sorted(
        float(t.get("y", 0)) for t in root.iter(f"{SVG}text") if (t.text or "").startswith("method")
    )[-4:]
    assert all(b - a >= 15 for a, b in zip(heights, heights[1:], strict=False))


def test_without_a_figure_nothing_is_drawn() -> None:
    with pytest.raises(ValueError, match="lines: expected at least one with a figure"):
        draw_growth({"a": [], "b": []})
