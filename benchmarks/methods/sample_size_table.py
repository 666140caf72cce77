"""The pilot's rows as a table and a picture: what a difference of 1 and of 2 points needs.

Points are percent. A measure has a row for M3I minus each other arm, and one of their mean
components, which is the one to plan by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from m3i_fast.benchmarks.core.svg import Axis, page, powers_of_ten, text
from m3i_fast.benchmarks.methods.run import unpack
from m3i_fast.benchmarks.methods.sample_size import (
    ALPHA,
    POWER,
    Components,
    cluster_means,
    clusters_needed,
    components,
    holm_alpha,
    mean_components,
    seeds_needed,
)
from m3i_fast.benchmarks.methods.table import NO_SHARE, OURS, TITLES, UNTRAINED, Row, Rows, title

DIFFERENCES = (1.0, 2.0)  # points
SEEDS = (3, 5, 10, 20)  # of the designs that the table shows
DRAWN_SEEDS = range(3, 31)
ALL = "mean of these"

_WIDTH, _TOP, _HEIGHT, _LEFTS = 920, 84, 290, (70, 530)  # pixels
_PLOT, _TALL = 300, 190  # a panel's axes


Pair = tuple[dict[str, Any], dict[str, Any]]  # figures of M3I and of the other


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """M3I minus another arm in one measure, or the mean of several such."""

    measure: str
    """As the tables call it."""
    name: str
    components: Components
    """In points."""
    num_seeds: int
    num_clusters: int
    minutes: float
    """Training of one seed of the arms compared, in minutes of one run's threads."""
    alpha: float


def compare_arms(rows: Rows, *, holm: bool = False) -> list[Comparison]:
    """Return every comparison of every measure with hits, where two seeds or more are shared.

    Of the hard half of the held-out items, where rows tell it, the means alone. holm: each at ALPHA
    over the number of a measure's comparisons.
    """
    ours = rows.get(OURS, {})
    comparisons: list[Comparison] = []
    for measure in (name for name in TITLES if name not in NO_SHARE):
        pairs_of = {
            name: pairs
            for name, seeds in rows.items()
            if name not in (OURS, UNTRAINED) and len(pairs := _pairs(ours, seeds, measure)) > 1
        }
        alpha = holm_alpha(len(pairs_of)) if holm and pairs_of else ALPHA
        for hard in (False, True) if _tell_items(pairs_of.values()) else (False,):
            of_measure = [
                _compared(measure, name, pairs, hard=hard, alpha=alpha)
                for name, pairs in pairs_of.items()
            ]
            comparisons += [] if hard else of_measure
            if len(of_measure) > 1:
                comparisons.append(_mean_of(of_measure, rows))
    return comparisons


def _pairs(ours: dict[int, Row], theirs: dict[int, Row], measure: str) -> list[Pair]:
    """Return the figures of both, seed by seed, where both have the measure."""
    pairs = ((ours[seed]["figures"], theirs[seed]["figures"]) for seed in ours if seed in theirs)
    return [pair for pair in pairs if all(measure in side["hits"]["trained"] for side in pair)]


def _tell_items(pairs_of: Iterable[list[Pair]]) -> bool:
    """Whether rows say which items are hard, and which are of one cluster."""
    sides = [side for pairs in pairs_of for pair in pairs for side in pair]
    return bool(sides) and all("items" in side for side in sides)


def _compared(
    measure: str, name: str, pairs: list[Pair], *, hard: bool, alpha: float
) -> Comparison:
    first, second = (
        np.array([unpack(side["hits"]["trained"][measure]) for side in sides])
        for sides in zip(*pairs, strict=True)
    )
    differences = 100 * (first - second)
    asked = ~np.isnan(differences).any(0)
    cluster = np.arange(len(asked))
    if _tell_items([pairs]):
        items = pairs[0][0]["items"]
        cluster = np.array(items["cluster"])
        if hard:
            asked &= np.array(unpack(items["hard"])) == 1
    by_cluster = cluster_means(differences[:, asked], cluster[asked])
    seconds = [sum(side["train_seconds"] for side in pair) for pair in pairs]
    return Comparison(
        measure=title(measure) + ", hard half" * hard,
        name=name,
        components=components(by_cluster),
        num_seeds=by_cluster.shape[0],
        num_clusters=by_cluster.shape[1],
        minutes=fmean(seconds) / 60,
        alpha=alpha,
    )


def _mean_of(of_measure: Sequence[Comparison], rows: Rows) -> Comparison:
    """Of comparisons with the same items, the typical one."""
    names = (OURS, *(each.name for each in of_measure))
    seconds = [
        fmean(row["figures"]["train_seconds"] for row in rows[name].values()) for name in names
    ]
    return replace(
        of_measure[0],
        name=ALL,
        components=mean_components(each.components for each in of_measure),
        num_seeds=min(each.num_seeds for each in of_measure),
        minutes=sum(seconds) / 60,
    )


# ---- Table ---------------------------------------------------------------------------------------


def power_table(comparisons: Sequence[Comparison]) -> str:
    """Return Markdown: each comparison's components, and the sizes that a difference needs."""
    if not comparisons:
        return "No power calculation: expected two seeds or more of m3i and of another arm.\n"
    levels = sorted({f"{each.alpha:.3g}" for each in comparisons})
    with_seeds = " / ".join(map(str, SEEDS))
    head = ["measure", "m3i minus", "difference (s.e.)", "s.d.: seed", "cluster", "rest"]
    head += ["minutes a seed"]
    for points in DIFFERENCES:
        size = f"{points:g} point{'s' * (points != 1)}"
        head += [f"{size}: clusters with {with_seeds} seeds", f"{size}: seeds with these clusters"]
    return "\n".join(
        [
            f"What a difference needs to be found with a probability of {100 * POWER:g} %, "
            f"two-sided at alpha {', '.join(levels)}; in points of percent, minutes of training of "
            "the arms compared on the threads of one run, - where no number is enough. Variances "
            "over a few seeds are coarse: plan by the means.",
            "",
            *(
                f"| {' | '.join(cells)} |"
                for cells in (head, ["---"] * len(head), *map(_cells, comparisons))
            ),
            "",
        ]
    )


def _cells(each: Comparison) -> list[str]:
    variances = each.components
    error = variances.standard_error(each.num_seeds, each.num_clusters)
    cells = [each.measure, each.name, f"{variances.mean:+.1f} ({error:.1f})"]
    cells += [_deviation(part) for part in (variances.seed, variances.cluster, variances.rest)]
    cells.append(f"{each.minutes:.1f}")
    for points in DIFFERENCES:
        clusters = (clusters_needed(variances, points, seeds, alpha=each.alpha) for seeds in SEEDS)
        cells.append(" / ".join("-" if number is None else f"{number:,}" for number in clusters))
        seeds = seeds_needed(variances, points, each.num_clusters, alpha=each.alpha)
        minutes = (
            f"{seeds} of {each.num_clusters} ({seeds * each.minutes:,.0f} min)" if seeds else "-"
        )
        cells.append(minutes)
    return cells


def _deviation(variance: float) -> str:
    """Return a standard deviation; a component that was estimated below 0 is none."""
    return f"{math.sqrt(max(variance, 0.0)):.1f}"


# ---- Picture -------------------------------------------------------------------------------------


def draw_power(comparisons: Sequence[Comparison], heading: str) -> str:
    """Return one SVG of clusters against seeds, a panel a measure, by its mean comparison.

    Raises ValueError where there is nothing to draw.
    """
    by_measure = {each.measure: each for each in comparisons}  # the last is the mean
    if not by_measure:
        raise ValueError("comparisons: expected at least one comparison, got none")
    elements = [
        text(_LEFTS[0], 30, heading, "title", "start"),
        text(
            _LEFTS[0],
            52,
            f"Held-out clusters that find a difference of 1 point (full line) and of 2 points "
            f"(dashed) in {100 * POWER:g} % of experiments.",
            "",
            "start",
        ),
    ]
    for index, each in enumerate(by_measure.values()):
        elements += _panel(_LEFTS[index % 2], _TOP + _HEIGHT * (index // 2), each)
    height = _TOP + _HEIGHT * -(-len(by_measure) // 2)
    return page(elements, width=_WIDTH, height=height, label=heading)


def _panel(left: float, top: float, each: Comparison) -> Iterator[str]:
    curves = {
        points: {
            seeds: number
            for seeds in DRAWN_SEEDS
            if (number := clusters_needed(each.components, points, seeds, alpha=each.alpha))
            is not None
        }
        for points in DIFFERENCES
    }
    numbers = [n for curve in curves.values() for n in curve.values()]
    marks = powers_of_ten([*numbers, each.num_clusters])
    bottom = top + 30 + _TALL
    x = Axis(DRAWN_SEEDS[0], DRAWN_SEEDS[-1], left, _PLOT, linear=True)
    y = Axis(marks[0], marks[-1], bottom, -_TALL)
    yield text(left, top + 14, each.measure, "name", "start")
    for mark in marks:
        yield f'<path class="grid" d="M{left} {y.place(mark):.1f}h{_PLOT}"/>'
        yield text(left - 8, y.place(mark) + 4, f"{mark:,.0f}", "", "end")
    for seeds in (3, 10, 20, 30):
        yield text(
            x.place(seeds),
            bottom + 18,
            f"{seeds} seeds" if seeds == 3 else str(seeds),
            "",
            "middle",
        )
    pilot = y.place(each.num_clusters)
    yield f'<path class="line others" d="M{left} {pilot:.1f}h{_PLOT}"/>'
    yield text(left + _PLOT + 6, pilot + 4, f"here {each.num_clusters:,}", "", "start")
    for points, curve in curves.items():
        if curve:
            path = "L".join(f"{x.place(s):.1f} {y.place(n):.1f}" for s, n in curve.items())
            dashed = " dashed" if points == DIFFERENCES[1] else ""
            tip = ", ".join(f"{s} seeds: {n:,}" for s, n in curve.items())
            yield f'<path class="line ours{dashed}" d="M{path}"><title>{tip}</title></path>'
