"""The tables and the picture of the methods' benchmark say what the rows say; oracle: scipy."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from m3i_fast.benchmarks.methods.plot import draw
from m3i_fast.benchmarks.methods.run import pack
from m3i_fast.benchmarks.methods.table import (
    Line,
    Rows,
    brief_table,
    measures,
    summarise,
    table,
    title,
)
from m3i_fast.evaluation.statistics import hits_interval

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


def _interval(ours: Hits, theirs: Hits) -> tuple[float, float]:  # [S, N] each
    """95 % bounds in percent: Student's of one seed, of several by an analysis of variance."""
    delta = np.concatenate([ours - theirs, np.broadcast_to([1.0, -1.0], (len(ours), 2))], 1)
    seeds, items = delta.shape
    squares = np.array([items * delta.mean(1).var(ddof=1) if seeds > 1 else 0.0])
    squares = np.append(squares, seeds * delta.mean(0).var(ddof=1))
    rest = delta - delta.mean(1, keepdims=True) - delta.mean(0) + delta.mean()
    squares = np.append(squares, (rest**2).sum() / max(seeds - 1, 1) / (items - 1)) / delta.size
    total = max(squares[0] + squares[1] - squares[2], squares[1])
    freedom = np.array([max(seeds - 1, 1), items - 1, max(seeds - 1, 1) * (items - 1)])
    half = stats.t.ppf(0.975, total**2 / (squares**2 / freedom).sum()) * total**0.5
    return 100 * (delta.mean() - half), 100 * (delta.mean() + half)


def test_differences_are_over_common_seeds_and_pair_the_items(rows: Rows) -> None:
    lines = {line.name: line for line in summarise(rows)}
    both = np.array(OURS)
    expected = {
        "byol": (both[1:], BYOL[None]),
        "milan": (both[:1], both[:1]),
        "untrained": (both, 1 - both),
        "raw pixels": (both, np.array([PIXELS, PIXELS])),
    }
    for name, (ours, theirs) in expected.items():
        found = lines[name].minus["knn_top1"]
        assert found.difference == pytest.approx(100 * (ours - theirs).mean(), abs=1e-9)
        assert (found.low, found.high) == pytest.approx(_interval(ours, theirs), abs=1e-4)
    assert lines["m3i"].minus == {}
    assert lines["byol"].minus.keys() == {"knn_top1"}  # of no other measure both have hits

    found = lines["byol"].minus["knn_top1"]
    cells = _cells(table(list(lines.values()), "10 s a run"), 1)
    text = f"**{found.difference:+.1f}** ({found.low:+.1f} to {found.high:+.1f})"
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
    oracle = stats.ttest_rel(np.round(ours, 4), np.round(theirs, 4))
    low, high = oracle.confidence_interval(0.95)
    mark = "**" if oracle.pvalue < 0.05 else ""
    assert found == f"{mark}{(ours - theirs).mean():+.2f}{mark} ({low:+.2f} to {high:+.2f})"


def test_bold_is_what_holm_leaves_of_the_table() -> None:
    """Of differences that are each told from zero alone, some are not among that many."""
    ours = _hits(0.6, 0)
    gains = np.linspace(0, 50, 12).astype(int)
    others = [np.where(np.arange(NUM) < n, 0.0, ours) for n in gains]
    rows: Rows = {
        name: {0: _row({"knn_top1": {"trained": hits}}, 0)}
        for name, hits in [("m3i", ours), *((f"m{i}", x) for i, x in enumerate(others))]
    }
    p_values = [stats.ttest_1samp(np.append(ours - x, [1, -1]), 0).pvalue for x in others]
    order = np.argsort(p_values)
    kept = [p_values[i] < 0.05 / (12 - rank) for rank, i in enumerate(order)]
    survives = set(order[: kept.index(False)].tolist())
    assert 2 < len(survives) < sum(p < 0.05 for p in p_values)
    text = table(summarise(rows), "10 s a run")
    assert "Holm's correction over all 12 comparisons" in text
    cells = _cells(text, 1)
    assert {i for i in range(12) if cells[f"m{i}"]["kNN"].startswith("**")} == survives


def test_a_measure_that_is_not_shown_is_corrected_for_all_the_same(rows: Rows) -> None:
    lines = summarise(rows)
    (whole,), (chosen,) = (
        {name for line in text.splitlines() if (name := line.partition("In bold")[2])}
        for text in (table(lines, "10 s"), table(lines, "10 s", shown=["knn_top1"]))
    )
    assert whole == chosen and "comparisons" in whole
    text = table(lines, "10 s", shown=["knn_top1"])
    assert list(_cells(text, 0)["m3i"])[:3] == ["method", "kNN", "images/s"]
    assert list(_cells(text, 1)["byol"]) == ["method", "kNN"]
    assert _cells(text, 1)["byol"]["kNN"] == _cells(table(lines, "10 s"), 1)["byol"]["kNN"]


# ---- The hard half -------------------------------------------------------------------------------

HARD = np.arange(NUM) % 4 < 2
CLUSTER = np.arange(NUM) // 8


def _split_row(hits: Hits, seed: int) -> dict[str, Any]:
    """With what its items are; of the first ten it says nothing."""
    asked = np.where(np.arange(NUM) < 10, np.nan, hits)
    row = _row({"knn_top1": {"trained": asked}}, seed)
    figures = row["figures"]
    figures["knn_top1"] = {"trained": float(np.nanmean(asked))}
    figures["knn_top1_hard"] = {"trained": float(np.nanmean(asked[HARD]))}
    figures["items"] = {"hard": pack(HARD.astype(float).tolist()), "cluster": CLUSTER.tolist()}
    figures["split_digest"] = "0123abcd"
    return row


def test_the_hard_half_has_tables_of_its_own() -> None:
    rows: Rows = {
        "byol": {seed: _split_row(_hits(0.5, 3 + seed), seed) for seed in (0, 1)},
        "m3i": {seed: _split_row(OURS[seed], seed) for seed in (0, 1)},
    }
    lines = {line.name: line for line in summarise(rows)}
    ours, theirs = np.array(OURS), np.array([_hits(0.5, 3 + seed) for seed in (0, 1)])
    for name, chosen in (("knn_top1", np.arange(NUM) >= 10), ("knn_top1_hard", HARD)):
        chosen = chosen & (np.arange(NUM) >= 10)
        oracle = hits_interval(ours[:, chosen], theirs[:, chosen], CLUSTER[chosen]).scaled(100)
        assert lines["byol"].minus[name] == oracle
        assert lines["m3i"].values[name] == pytest.approx(100 * ours[:, chosen].mean())
    text = table(list(lines.values()), "10 s a run")
    assert text.startswith("10 s a run, batch 32; 400 held-out concepts (split 0123abcd), 2 cores")
    assert list(_cells(text, 0)["m3i"]) == ["method", "kNN", "images/s", "steps", "seeds"]
    assert _cells(text, 2)["m3i"] == {
        "method": "m3i",
        "kNN": f"{lines['m3i'].values['knn_top1_hard']:.1f}",
    }
    assert f"{lines['byol'].minus['knn_top1_hard'].low:+.1f}" in _cells(text, 3)["byol"]["kNN"]
    names = ("new_hard", "knn_top1_hard", "new", "knn_top1")
    mixed = Line("m3i", dict.fromkeys(names, 0.0), {}, [])
    assert measures([mixed]) == ["knn_top1", "new", "knn_top1_hard", "new_hard"]
    assert title("knn_top1_hard") == "kNN, hard half"


def test_a_brief_table_says_the_same_in_one() -> None:
    rows: Rows = {
        "byol": {seed: _split_row(_hits(0.5, 3 + seed), seed) for seed in (0, 1)},
        "m3i": {seed: _split_row(OURS[seed], seed) for seed in (0, 1)},
    }
    lines = summarise(rows)
    whole, brief = table(lines, "10 s"), brief_table(lines, "10 s")
    cells = _cells(brief, 0)
    for name, places in (("kNN", (0, 1)), ("kNN, hard half", (2, 3))):
        value, minus = (_cells(whole, place)["byol"]["kNN"] for place in places)
        assert cells["byol"][name] == f"{value}, {minus}"
        assert cells["m3i"][name] == _cells(whole, places[0])["m3i"]["kNN"]
    assert "no row in the ledger" in brief_table(summarise({}), "10 s")


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
    names = {
        text.text for text in ElementTree.fromstring(draw(lines, "", shown=["knn_top1"])).iter()
    }
    assert "kNN" in names and "linear" not in names
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
    bars = [path for path in picture.iter(f"{SVG}path") if "line" in path.attrib["class"]]
    names = [name for name in ordered if name != "m3i"]
    assert len(bars) >= len(names)
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
