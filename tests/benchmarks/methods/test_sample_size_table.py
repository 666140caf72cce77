"""The pilot's table and picture say what the rows say; oracle: numpy on the rows' hits."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest

from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.benchmarks.methods.main import main
from m3i_fast.benchmarks.methods.plan import Config, recipe_trees
from m3i_fast.benchmarks.methods.run import pack
from m3i_fast.benchmarks.methods.sample_size import cluster_means, clusters_needed, components
from m3i_fast.benchmarks.methods.sample_size_table import compare_arms, draw_power, power_table
from m3i_fast.benchmarks.methods.table import Rows

SVG = "{http://www.w3.org/2000/svg}"
ITEMS, SEEDS = 200, (0, 1, 2)
ARMS = {"supervised": (0.5, 60.0), "clip": (0.55, 90.0), "m3i": (0.6, 120.0)}  # hits, seconds
CLUSTER = np.repeat(np.arange(50), 4)
HARD = np.arange(ITEMS) % 8 < 4  # whole clusters
Hits = npt.NDArray[np.float64]


def _hits() -> dict[str, Hits]:
    """Arm -> [seeds, items]."""
    rng = np.random.default_rng(0)
    ease = rng.normal(0, 0.2, ITEMS)
    return {
        name: (rng.random((len(SEEDS), ITEMS)) < share + ease).astype(float)
        for name, (share, _) in ARMS.items()
    }


def _rows(hits: Mapping[str, Hits], *, items: bool) -> Rows:
    told: dict[str, Any] = {
        "items": {"cluster": CLUSTER.tolist(), "hard": pack(HARD.astype(float).tolist())}
    }
    return {
        name: {
            seed: {
                "figures": {
                    "hits": {"trained": {"knn_top1": pack(hits[name][index].tolist())}},
                    "train_seconds": ARMS[name][1],
                    **(told if items else {}),
                }
            }
            for index, seed in enumerate(SEEDS)
        }
        for name in ARMS
    }


def test_comparisons_are_of_the_rows_hits() -> None:
    hits = _hits()
    supervised, clip, both = compare_arms(_rows(hits, items=False))
    assert [each.name for each in (supervised, clip, both)] == [
        "supervised",
        "clip",
        "mean of these",
    ]
    for each, name in ((supervised, "supervised"), (clip, "clip")):
        assert each.components == components(100 * (hits["m3i"] - hits[name]))
        assert (each.measure, each.num_seeds, each.num_clusters) == ("kNN", 3, ITEMS)
    assert (supervised.minutes, clip.minutes, both.minutes) == (3.0, 3.5, 4.5)
    for part in ("mean", "seed", "cluster", "rest"):
        values = [getattr(each.components, part) for each in (supervised, clip)]
        assert getattr(both.components, part) == pytest.approx(np.mean(values))
    assert {each.alpha for each in compare_arms(_rows(hits, items=False), holm=True)} == {0.025}


def test_items_of_a_cluster_count_together_and_the_hard_half_is_told() -> None:
    hits = _hits()
    hits["clip"][1, 7] = np.nan  # an item that one run was not asked about
    rows = _rows(hits | {"clip": np.nan_to_num(hits["clip"])}, items=True)
    rows["clip"][1]["figures"]["hits"]["trained"]["knn_top1"] = hits["clip"][1].tolist()
    supervised, clip, _, hard = compare_arms(rows)
    delta = 100 * (hits["m3i"] - hits["supervised"])
    expected = components(delta.reshape(3, 50, 4).mean(2))
    for part in ("mean", "seed", "cluster", "rest"):
        assert getattr(supervised.components, part) == pytest.approx(getattr(expected, part))
    assert supervised.num_clusters == clip.num_clusters == 50
    kept = np.arange(ITEMS) != 7
    delta = 100 * (hits["m3i"] - hits["clip"])[:, kept]
    assert clip.components == components(cluster_means(delta, CLUSTER[kept]))
    assert (hard.measure, hard.name, hard.num_clusters) == ("kNN, hard half", "mean of these", 25)
    halves = [100 * (hits["m3i"] - hits[name])[:, HARD & kept] for name in ("supervised", "clip")]
    assert hard.components.mean == pytest.approx(np.mean([half.mean() for half in halves]))


def test_the_table_has_the_sizes() -> None:
    rows = _rows(_hits(), items=False)
    comparisons = compare_arms(rows, holm=True)
    text = power_table(comparisons)
    assert "probability of 80 %, two-sided at alpha 0.025" in text
    head, _, *lines = (
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    )
    cells = [dict(zip(head, line, strict=True)) for line in lines]
    for line, each in zip(cells, comparisons, strict=True):
        needed = [clusters_needed(each.components, 2.0, s, alpha=0.025) for s in (3, 5, 10, 20)]
        shown = line["2 points: clusters with 3 / 5 / 10 / 20 seeds"]
        assert shown == " / ".join("-" if n is None else f"{n:,}" for n in needed)
        error = each.components.standard_error(3, ITEMS)
        assert line["difference (s.e.)"] == f"{each.components.mean:+.1f} ({error:.1f})"
        assert float(line["rest"]) == pytest.approx(each.components.rest**0.5, abs=0.05)
    assert any(
        line["2 points: clusters with 3 / 5 / 10 / 20 seeds"] != "- / - / - / -" for line in cells
    )
    one = {name: {0: seeds[0]} for name, seeds in rows.items()}
    assert "expected two seeds or more of m3i and of another arm" in power_table(compare_arms(one))


def test_one_command_prints_and_draws_both_tables_of_the_pilot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = Config(pilot=True, num_steps=7, ledger=tmp_path, data=tmp_path)
    told = {
        "batch_size": 32,
        "num_steps": 7,
        "train_images_per_s": 100.0,
        "held_out_concepts": ITEMS,
        "collapsed": [],
        "teacher": None,
        "knn_top1": {"trained": 0.5},
    }
    for name, seeds in _rows(_hits(), items=True).items():
        for seed, row in seeds.items():
            run = cfg.groups[0].run(name, seed, data="0" * 8)
            figures = {**asdict(run), "recipes": recipe_trees(name), **row["figures"], **told}
            append_row("methods", figures, command="test", folder=tmp_path)
    arguments = ["--num-steps", "7", "--ledger", str(tmp_path), "--data", str(tmp_path)]
    main(["--pilot", "--table-only", "--holm", *arguments])
    shown = capsys.readouterr().out
    assert "7 steps a run, classes of 3 % of the concepts, captions of 30 %" in shown
    assert "two-sided at alpha 0.025" in shown and "| kNN, hard half | mean of these |" in shown
    pictures = {path.name for path in tmp_path.glob("*.svg")}
    assert pictures == {"methods_pilot.svg", "methods_pilot_power.svg"}


def test_curves_stand_at_their_sizes() -> None:
    comparisons = compare_arms(_rows(_hits(), items=False))
    root = ElementTree.fromstring(draw_power(comparisons, "3 % & more"))
    texts = [node.text for node in root.iter(f"{SVG}text")]
    assert texts[0] == "3 % & more" and "kNN" in texts and f"here {ITEMS}" in texts
    curves = [p for p in root.iter(f"{SVG}path") if "line ours" in p.get("class", "")]
    points = [
        [tuple(map(float, point.split())) for point in curve.attrib["d"][1:].split("L")]
        for curve in curves
    ]
    tips = [str(curve[0].text) for curve in curves]
    of = {
        points: {s: clusters_needed(comparisons[-1].components, points, s) for s in range(3, 31)}
        for points in (1.0, 2.0)
    }
    for tip, curve, needed in zip(tips, points, of.values(), strict=True):
        told = {s: n for s, n in needed.items() if n is not None}
        assert tip == ", ".join(f"{s} seeds: {n:,}" for s, n in told.items())
        # Ten times as many clusters are as high wherever they are.
        logs = np.log10(list(told.values()))
        heights = np.array([y for _, y in curve])
        slope, start = np.polyfit(logs, heights, 1)
        assert slope < 0 and heights == pytest.approx(start + slope * logs, abs=0.15)
    with pytest.raises(ValueError, match="comparisons: expected at least one comparison, got none"):
        draw_power([], "nothing")
