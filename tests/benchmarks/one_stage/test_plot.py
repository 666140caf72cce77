"""The pictures stand where the comparisons say; oracle: the comparisons."""

from collections.abc import Iterator
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from m3i_fast.benchmarks.one_stage.plot import draw, draw_shares
from m3i_fast.benchmarks.one_stage.resampling import ClusterCounts, accuracy, resample
from m3i_fast.benchmarks.one_stage.verdict import Comparison, compare

SVG = "{http://www.w3.org/2000/svg}"
ARMS = {"m3i": 60.0, "category + caption": 52.0, "slip & more": 45.0}


def _comparison(measure: str, shift: float = 0.0) -> Comparison:
    rng = np.random.default_rng(0)
    runs = {
        arm: {
            seed: ClusterCounts(
                cluster=100 * seed + np.arange(30),
                counts=np.stack([rng.normal(mean + shift, 9, 30), np.full(30, 100.0)], 1),
            )
            for seed in range(4)
        }
        for arm, mean in ARMS.items()
    }
    return compare(measure, resample(runs, accuracy, num_draws=300))


def _root(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for node in (*root.iter(f"{SVG}circle"), *root.iter(f"{SVG}text")):
        x, y = (node.get(name) or node.get(f"c{name}") for name in ("x", "y"))
        assert 0 <= float(x or -1) <= width and 0 <= float(y or -1) <= height
    return root


def _dots(root: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Tip -> place."""
    return {
        str(node[0].text): (float(node.attrib["cx"]), float(node.attrib["cy"]))
        for node in root.iter(f"{SVG}circle")
    }


def _texts(root: ElementTree.Element) -> list[str]:
    return [str(node.text) for node in root.iter(f"{SVG}text")]


def _starts(root: ElementTree.Element, tip: str) -> Iterator[tuple[float, float]]:
    """Ends of the bars that stand at the height of a dot."""
    y = _dots(root)[tip][1]
    for node in root.iter(f"{SVG}path"):
        words = node.attrib["d"][1:].replace("H", " ").split()
        if "H" in node.attrib["d"] and float(words[1]) == y:
            yield float(words[0]), float(words[2])


def test_all_seeds_means_and_differences_are_drawn() -> None:
    sets = {"styles": _comparison("styles: linear, %"), "earth": _comparison("earth: mIoU, %", 9)}
    root = _root(draw(sets, "3 % of labels"))
    texts, dots = _texts(root), _dots(root)
    assert texts[0] == "3 % of labels"
    for each in sets.values():
        assert f"{each.measure} (4 seeds, 120 clusters)" in texts
        seeds = {
            value: dots[f"{arm}, seed {seed}: {value:.1f}"][0]
            for arm, values in each.by_seed.items()
            for seed, value in zip(each.seeds, values, strict=True)
        }
        seeds |= {
            mean.value: dots[f"{arm}: {mean.value:.1f} ({mean.low:.1f} to {mean.high:.1f})"][0]
            for arm, mean in each.means.items()
        }
        slope, start = np.polyfit(list(seeds), list(seeds.values()), 1)
        assert slope > 0
        assert list(seeds.values()) == pytest.approx(
            [start + slope * value for value in seeds], abs=0.1
        )
        names = [arm for arm in ARMS if arm != "m3i"]
        minus = {f"m3i minus {arm}: {each.minus[arm]}": each.minus[arm] for arm in names}
        minus[f"m3i minus best other: {each.minus_best}"] = each.minus_best
        x = {tip: dots[tip][0] for tip in minus}
        slope, start = np.polyfit([row.value for row in minus.values()], list(x.values()), 1)
        for tip, row in minus.items():
            ends = [start + slope * end for end in (row.low, row.high)]
            assert any(bar == pytest.approx(ends, abs=2) for bar in _starts(root, tip)), tip
    assert texts.count("best other") == 2
    with pytest.raises(ValueError, match="sets: expected at least one, got none"):
        draw({}, "nothing")


def test_curves_run_over_the_shares_that_there_are() -> None:
    styles = {share: _comparison("styles: linear, %", 10 * share) for share in (0.01, 0.03, 1.0)}
    del styles[1.0].means["slip & more"]
    of_share = {share: {"styles": each} for share, each in styles.items()}
    of_share[0.03]["earth"] = _comparison("earth: mIoU, %")
    root = _root(draw_shares(of_share, "Over labels"))
    texts, dots = _texts(root), _dots(root)
    assert texts.count("1 %") == texts.count("10 %") == texts.count("100 %") == 2
    assert {"styles: linear, %", "earth: mIoU, %"} <= set(texts)
    places = {
        share: dots[f"m3i, {100 * share:g} % of labels: {each.means['m3i'].value:.1f}"]
        for share, each in styles.items()
    }
    # A decade is as wide wherever it is.
    logs = np.log10(list(places))
    x = [place[0] for place in places.values()]
    slope, start = np.polyfit(logs, x, 1)
    assert slope > 0 and x == pytest.approx(list(start + slope * logs), abs=0.1)
    assert not any(tip.startswith("slip & more, 100 %") for tip in dots)
    curves = [p for p in root.iter(f"{SVG}path") if "L" in p.get("d", "")]
    assert len(curves) == 3 and curves[0].get("class") == "line ours"
    last = {arm: dots[tip] for tip in dots for arm in ARMS if tip.startswith(f"{arm}, 3 %")}
    assert len(last) == len(ARMS)


def test_bars_over_labels_are_the_intervals_of_differences_from_ours() -> None:
    each = _comparison("styles: linear, %")
    root = _root(draw_shares({0.03: {"styles": each}}, "One"))
    dots = _dots(root)
    place = {arm: dots[f"{arm}, 3 % of labels: {m.value:.1f}"] for arm, m in each.means.items()}
    values = [mean.value for mean in each.means.values()]
    slope, start = np.polyfit(values, [place[arm][1] for arm in each.means], 1)
    bars = {}
    for node in root.iter(f"{SVG}path"):
        if node.get("stroke-opacity"):
            x, low, high = map(float, node.attrib["d"][1:].replace("V", " ").split())
            bars[x] = [(low - start) / slope, (high - start) / slope]
    assert len(bars) == len(each.minus)
    for arm, minus in each.minus.items():
        ours = each.means["m3i"].value
        assert bars[place[arm][0]] == pytest.approx([ours - minus.high, ours - minus.low], abs=0.2)


def test_one_share_alone_is_drawn_at_its_place() -> None:
    each = _comparison("styles: linear, %")
    for share in (0.03, 1.0, 0.5):
        root = _root(draw_shares({share: {"styles": each}}, "One"))
        assert f"{100 * share:g} %" in _texts(root) and len(_dots(root)) == len(ARMS)
    with pytest.raises(ValueError, match="of_share: expected at least one comparison, got none"):
        draw_shares({0.03: {}}, "nothing")


def test_names_at_the_ends_do_not_cover_each_other() -> None:
    each = _comparison("styles: linear, %")
    first = next(iter(each.minus.values()))
    alike = {f"arm {i}": first for i in range(6)}
    means = dict.fromkeys(alike, each.means["m3i"])
    crowded = replace(each, minus=alike, means={**means, "m3i": each.means["m3i"]})
    root = _root(draw_shares({0.03: {"styles": crowded}}, "Crowded"))
    heights = sorted(
        float(node.attrib["y"])
        for node in root.iter(f"{SVG}text")
        if str(node.text) == "m3i" or str(node.text).startswith("arm")
    )
    assert len(heights) == 7
    assert all(b - a >= 15 for a, b in zip(heights, heights[1:], strict=False))
