"""Scaling rows as one SVG: images a second and efficiency against ranks, prediction told apart.

A block of two panels for each machine and recipe, its newest rows. Weak scaling in the accent
colour, strong in the second. Measured: full lines and points, with 95 % intervals. Predicted:
dashed lines and hollow points, and words that say so and how wrong the model was where it could be
checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core.svg import Axis, page, powers_of_ten, text
from m3i_fast.benchmarks.scaling.table import MEASURED, prediction

_WIDTH, _BLOCK, _PANEL = 920, 450, (360, 250)  # pixels; a panel's width and height
_LEFTS, _TOP = (80, 540), 140  # of the panels in a block
_KINDS = {"weak": "ours", "strong": "others"}
_LEGEND = {"weak": "weak: a batch a rank", "strong": "strong: a batch of all ranks"}


@dataclass(frozen=True, slots=True)
class Curve:
    """The rows of one mode: measured ones by ranks, and predictions."""

    measured: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    predicted: list[Mapping[str, Any]] = field(default_factory=list)


def newest(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Return rows by machine and recipe, then by mode, up to each mode's newest prediction."""
    blocks: dict[str, dict[str, Curve]] = {}
    open_curves: dict[tuple[str, str], Curve] = {}
    for row in rows:  # oldest first; a command ends with its predictions
        figures = row["figures"]
        on_gpu = figures["device"] == "cuda"
        machine = row["machine"]["gpu" if on_gpu else "cpu"]
        title = f"{figures['recipe']}, {machine}" + ("" if on_gpu else ", gloo, a thread a process")
        key = title, figures["mode"]
        if figures["kind"] == MEASURED:
            if figures["ranks"] == 1:
                open_curves[key] = Curve()
            if key in open_curves:
                open_curves[key].measured[figures["ranks"]] = figures
        elif key in open_curves:
            curve = open_curves.pop(key)
            curve.predicted.append(figures)
            blocks.setdefault(title, {})[figures["mode"]] = curve
    return blocks


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the SVG of the ledger's rows, oldest first. Raises ValueError where there are none."""
    blocks = newest(rows)
    if not blocks:
        raise ValueError("rows: expected rows of scaling up to a prediction, got none")
    elements: list[str] = []
    for index, (title, curves) in enumerate(blocks.items()):
        elements += [
            f'<g transform="translate(0 {index * _BLOCK})">',
            *_block(title, curves),
            "</g>",
        ]
    label = "Images a second and scaling efficiency against the number of ranks"
    return page(elements, width=_WIDTH, height=_BLOCK * len(blocks), label=label)


def _block(title: str, curves: Mapping[str, Curve]) -> Iterator[str]:
    yield text(_LEFTS[0], 30, title, "title", "start")
    for index, (mode, curve) in enumerate(curves.items()):
        left, y = _LEFTS[index], 76 + 18 * index
        shared = any(row["shares_cores"] for row in curve.measured.values())
        words = _LEGEND[mode] + (" (processes share cores)" if shared else "")
        yield f'<path class="line {_KINDS[mode]}" d="M{left} 50h28"/>'
        yield text(left + 36, 54, words, "name", "start")
        for row in curve.predicted:
            yield text(_LEFTS[0], y, f"{prediction(row)} Dashed, hollow.", "", "start")
    counts = sorted(
        {n for curve in curves.values() for n in curve.measured}
        | {p["ranks"] for curve in curves.values() for p in _points(curve)}
    )
    x = [Axis(counts[0] / 1.2, counts[-1] * 1.2, left, _PANEL[0]) for left in _LEFTS]
    rates = [
        rate
        for curve in curves.values()
        for rate in (
            *(row["images_s"]["median"] for row in curve.measured.values()),
            *(point["images_s"] for point in _points(curve)),
        )
    ]
    ticks = powers_of_ten(rates)
    bottom = _TOP + _PANEL[1]
    y_rate = Axis(ticks[0], ticks[-1], bottom, -_PANEL[1])
    yield from _frame(x[0], y_rate, "images/s of all ranks", counts, ticks)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    highest = max(1.1, *map(_highest, curves.values()))
    y_share = Axis(0.0, highest, bottom, -_PANEL[1], linear=True)
    yield from _frame(x[1], y_share, "E(n) = T(n) / (n T(1))", counts, shares)
    for mode, curve in curves.items():
        yield from _line(mode, curve, x[0], y_rate, "images_s")
        yield from _line(mode, curve, x[1], y_share, "efficiency")


def _points(curve: Curve) -> list[Mapping[str, Any]]:
    return [point for row in curve.predicted for point in row["points"]]


def _highest(curve: Curve) -> float:
    ends = [row["efficiency"]["ci_high"] for row in curve.measured.values()]
    return 1.05 * max([*ends, *(point["efficiency"] for point in _points(curve))])


def _frame(
    x: Axis, y: Axis, name: str, counts: Sequence[int], ticks: Sequence[float]
) -> Iterator[str]:
    yield text(x.at, _TOP - 12, name, "name", "start")
    yield text(x.at + x.length / 2, y.at + 40, "ranks", "", "middle")
    for value in ticks:
        yield f'<path class="grid" d="M{x.at} {y.place(value):.1f}h{x.length}"/>'
        yield text(x.at - 8, y.place(value) + 4, f"{value:,.10g}", "", "end")
    for count in counts:
        yield f'<path class="grid" d="M{x.place(count):.1f} {y.at}v5"/>'
        yield text(x.place(count), y.at + 20, f"{count:,}", "", "middle")


def _line(mode: str, curve: Curve, x: Axis, y: Axis, measure: str) -> Iterator[str]:
    """Measured, and predicted by itself: the two need not meet."""
    kind = _KINDS[mode]
    middle = {"images_s": "median", "efficiency": "value"}[measure]
    places = [
        (x.place(count), y.place(row[measure][middle])) for count, row in curve.measured.items()
    ]
    yield f'<polyline class="line {kind}" points="{_path(places)}"/>'
    for (px, py), (count, row) in zip(places, curve.measured.items(), strict=True):
        measured = row[measure]
        low, high = y.place(measured["ci_low"]), y.place(measured["ci_high"])
        yield f'<path class="line {kind}" d="M{px:.1f} {low:.1f}V{high:.1f}"/>'
        yield _circle(kind, px, py, f"{mode}, {count} ranks: {measured[middle]:.4g}, measured")
    ahead = [(x.place(p["ranks"]), y.place(p[measure])) for p in _points(curve)]
    if not ahead:
        return
    yield f'<polyline class="line dashed {kind}" points="{_path(ahead)}"/>'
    for (px, py), point in zip(ahead, _points(curve), strict=True):
        tip = f"{mode}, {point['ranks']:,} ranks: {point[measure]:.4g}, predicted"
        yield _circle(f"{kind} hollow", px, py, tip)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in places)


def _circle(kind: str, px: float, py: float, tip: str) -> str:
    return (
        f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
        f"<title>{escape(tip)}</title></circle>"
    )
