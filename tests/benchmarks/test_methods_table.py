"""The tables and the picture of the methods' benchmark say what the rows say; oracle: numpy."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest

from m3i_fast.benchmarks.methods_plot import draw
from m3i_fast.benchmarks.methods_run import pack
from m3i_fast.benchmarks.methods_table import Rows, measures, summarise, table

SVG = "{http://www.w3.org/2000/svg}"
NUM = 400
Hits = npt.NDArray[np.float64]


def _hits(share: float, seed: int) -> Hits:
    return (np.random.default_rng(seed).random(NUM) < share).astype(np.float64)


def _row(hits: dict[str, dict[str, Hits]], seed: int, **more: Any) -> dict[str, Any]:
    """hits: measure -> source -> hits."""
    figures = {
        "seed": seed,
        "batch_size": 32,
        "num_steps": 400 + seed,
        "train_images_per_s": 100.0 + seed,
        "held_out_concepts": NUM,
        "collapsed": [],
        "teacher": None,
        **{name: {who: float(x.mean()) for who, x in of.items()} for name, of in hits.items()},
        "hits": {
            who: {name: pack(of[who].tolist()) for name, of in hits.items() if who in of}
            for who in ("trained", "untrained", "pixels")
        },
        **more,
    }
    return {"commit": "abc", "machine": {"cpu": "A", "num_cores": 2}, "figures": figures}


OURS = [_hits(0.7, seed) for seed in (1, 2)]
BYOL = _hits(0.5, 3)
PIXELS = _hits(0.6, 4)
RECALL = _hits(0.1, 5)
FEW = np.random.default_rng(6).integers(0, 4, NUM) / 3


@pytest.fixture
def rows() -> Rows:
    rest = [{"knn_top1": {"untrained": 1 - x, "pixels": PIXELS}} for x in (*OURS, BYOL)]
    recall = {"caption_to_image_recall_at_5": {"trained": RECALL}}
    rank, no_rank = (
        {"effective_rank": {who: x}} for who, x in (("trained", 12.0), ("untrained", 3.0))
    )
    few = {"few_label_top1": {"trained": FEW}, "something_new": {"trained": FEW}}
    milan = {"collapsed": ["monitor/target_rank"], "batch_size": 30, "teacher": "supervised-1"}
    return {
        "byol": {1: _row({"knn_top1": {"trained": BYOL}, **few}, 1)},
        "milan": {0: _row({"knn_top1": {"trained": OURS[0]}}, 0, **milan)},
        "m3i": {
            seed: _row({"knn_top1": {"trained": OURS[seed]}} | recall, seed, **rank)
            for seed in (0, 1)
        },
        "untrained": {seed: _row(rest[seed], seed, **no_rank) for seed in (0, 1, 2)},
    }


def _cells(text: str, block: int) -> dict[str, dict[str, str]]:
    """The block-th table: line -> column -> cell."""
    grids = [part.splitlines() for part in text.split("\n\n") if part.startswith("| method")]
    head, _, *lines = ([cell.strip() for cell in x.strip("| ").split(" |")] for x in grids[block])
    return {cells[0]: dict(zip(head, cells, strict=False)) for cells in lines}


def test_figures_are_means_over_seeds(rows: Rows) -> None:
    cells = _cells(table(summarise(rows), "10 s a run"), 0)
    assert list(cells) == ["byol", "milan (t)", "m3i", "untrained", "raw pixels"]
    mean = 100 * np.mean(OURS)
    assert cells["m3i"]["kNN"] == f"{mean:.1f}"
    assert cells["untrained"]["kNN"] == f"{100 - mean:.1f}"
    assert cells["raw pixels"]["kNN"] == f"{100 * PIXELS.mean():.1f}"
    assert cells["byol"]["few labels"] == f"{100 * FEW.mean():.1f}"
    assert cells["byol"]["something_new"] == cells["byol"]["few labels"]
    assert (
        cells["m3i"]["effective rank"] == "12.0" and cells["untrained"]["effective rank"] == "3.0"
    )
    assert cells["byol"]["caption to image R@5"] == cells["byol"]["effective rank"] == "-"
    assert [cells["m3i"][name] for name in ("images/s", "steps", "seeds")] == [
        "100",
        "400 to 401",
        "0, 1",
    ]
    assert cells["milan (t)"]["notes"] == "batch 30; collapsed: target_rank"


def _interval(ours: Hits, theirs: Hits) -> npt.NDArray[np.float64]:
    """Difference and 95 % bounds, in percent, by the normal approximation of the bootstrap's."""
    delta = np.append(ours - theirs, [1.0, -1.0])
    spread = 1.96 * delta.std() / len(delta) ** 0.5
    middle = delta.mean()
    return 100 * np.array([(ours - theirs).mean(), middle - spread, middle + spread])


def test_differences_are_over_common_seeds_and_pair_the_items(rows: Rows) -> None:
    lines = {line.name: line for line in summarise(rows)}
    both = np.mean(OURS, axis=0)
    expected = {
        "byol": _interval(OURS[1], BYOL),
        "milan": np.zeros(3),
        "untrained": _interval(both, 1 - both),
        "raw pixels": _interval(both, PIXELS),
    }
    for name, (difference, low, high) in expected.items():
        found = lines[name].minus["knn_top1"]
        assert found.difference == pytest.approx(difference, abs=1e-9)
        if name != "milan":  # two items added, one each way: not normal
            assert (found.low, found.high) == pytest.approx((low, high), abs=0.4)
    assert lines["milan"].minus["knn_top1"].low < 0 < lines["milan"].minus["knn_top1"].high
    assert lines["m3i"].minus == {}
    assert lines["byol"].minus.keys() == {"knn_top1"}  # of no other measure both have hits

    found = lines["byol"].minus["knn_top1"]
    cells = _cells(table(list(lines.values()), "10 s a run"), 1)
    text = f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
    assert cells["byol"]["kNN"] == text
    assert "m3i" not in cells and "effective rank" not in cells["byol"]


def test_nats_have_their_interval_in_nats() -> None:
    rng = np.random.default_rng(7)
    ours, theirs = rng.normal(0.5, 1.0, NUM), rng.normal(0.2, 1.0, NUM)  # below 0, above 1
    rows: Rows = {
        name: {0: _row({"caption_information_nats": {"trained": values}}, 0)}
        for name, values in (("m3i", ours), ("clip", theirs))
    }
    found = _cells(table(summarise(rows), "10 s a run"), 1)["clip"]["captions, nats"]
    delta = np.round(ours, 4) - np.round(theirs, 4)
    resampled = delta[rng.integers(0, NUM, (4000, NUM))].mean(1)
    expected = [delta.mean(), *np.quantile(resampled, [0.025, 0.975])]
    shown = [float(x) for x in found.replace("(", "").replace(")", "").replace("to ", "").split()]
    assert shown == pytest.approx(expected, abs=0.02)


def test_what_stands_around_the_tables(rows: Rows) -> None:
    text = table(summarise(rows), "10 s a run", note="about variants")
    assert text.startswith("10 s a run, batch 32; 400 held-out concepts, 2 cores of A, commit abc")
    assert "(t): from the frozen encoder of `supervised`" in text and "about variants." in text
    assert "no row in the ledger" in table(summarise({}), "10 s a run")
    without = table(summarise({"byol": rows["byol"]}), "10 s a run")
    assert "No difference to M3I" in without and "(t)" not in without


# ---- Picture -------------------------------------------------------------------------------------


def test_points_and_bars_stand_at_their_values(rows: Rows) -> None:
    lines = summarise(rows)
    picture = ElementTree.fromstring(draw(lines, "10 s & more"))
    texts = [(text.text, text.get("class")) for text in picture.iter(f"{SVG}text")]
    assert texts[0] == ("10 s & more", "title")
    assert [text for text, kind in texts if kind == "name"] == [
        "kNN",
        "few labels",
        "caption to image R@5",
        "effective rank",
        "something_new",
    ]
    assert measures(lines)[0] == "knn_top1"
    shown = {line.name: line for line in lines}
    ordered = sorted(shown, key=lambda name: -shown[name].values["knn_top1"])
    circles = list(picture.iter(f"{SVG}circle"))[: len(lines)]
    tips = [circle.find(f"{SVG}title").text for circle in circles]  # type: ignore[union-attr]
    assert [str(tip).split(":")[0] for tip in tips] == ordered
    heights = [float(circle.attrib["cy"]) for circle in circles]
    assert heights == sorted(heights)

    # Pixels are linear in the values: the slope from two points holds for all ends of bars.
    values = np.array([shown[name].values["knn_top1"] for name in ordered])
    places = np.array([float(circle.attrib["cx"]) for circle in circles])
    slope, start = np.polyfit(values, places, 1)
    assert places == pytest.approx(start + slope * values, abs=0.1)
    ours = shown["m3i"].values["knn_top1"]
    bars = [path for path in picture.iter(f"{SVG}path") if "bar" in path.attrib["class"]]
    names = [name for name in ordered if name != "m3i"]
    for name, bar in zip(names, bars, strict=False):
        found = shown[name].minus["knn_top1"]
        left, right = (float(x.split()[0]) for x in bar.attrib["d"][1:].split("H"))
        ends = start + slope * np.array([ours - found.high, ours - found.low])
        assert (left, right) == pytest.approx(tuple(ends), abs=0.15)
    marked = [path for path in picture.iter(f"{SVG}path") if path.get("class") == "ours"]
    assert float(marked[0].attrib["d"][1:].split()[0]) == pytest.approx(
        start + slope * ours, abs=0.1
    )
    assert len(marked) == 3  # in a panel each that has a figure of M3I
    with pytest.raises(ValueError, match="lines: expected at least one with a figure, got none"):
        draw([], "nothing")
