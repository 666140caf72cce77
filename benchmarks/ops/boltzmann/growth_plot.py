"""Growth rows of boltzmann as one SVG: seconds and memory against N, both axes logarithmic.

Self-contained, and readable on light and dark pages. A block of two panels for each machine, a line
for each function: ours in the accent colour, the others' in the second; the sigmoid form dashed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core.svg import Axis, page, powers_of_ten, text
from m3i_fast.benchmarks.ops.boltzmann.losses import OURS

_WIDTH, _BLOCK, _PANEL = 920, 420, (360, 250)  # pixels; a panel's width and height
_LEFTS, _TOP = (80, 540), 110  # of the panels in a block


def newest(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return each function's newest curve, by machine, with that machine's newest settings."""
    machines: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    settings: dict[str, str] = {}
    for row in rows:  # oldest first
        figures, on_gpu = row["figures"], row["figures"]["device"] == "cuda"
        machine = row["machine"]["gpu" if on_gpu else "cpu"]
        threads = "" if on_gpu else f"{figures['num_threads']} threads, "
        title = f"{machine}, {threads}{figures['dtype']}, D = {figures['dim']}"
        if settings.get(machine) != title:
            settings[machine], machines[machine] = title, {}
        machines[machine][figures["form"], figures["function"]] = figures
    return {settings[machine]: list(curves.values()) for machine, curves in machines.items()}


def draw(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the SVG of growth rows, oldest first. Raises ValueError where there are none."""
    blocks = newest(rows)
    if not blocks:
        raise ValueError("rows: expected growth rows of boltzmann, got none")
    height = _BLOCK * len(blocks)
    label = "Seconds and memory of contrastive losses against the number of pairs"
    elements: list[str] = []
    for index, (title, curves) in enumerate(blocks.items()):
        elements += [
            f'<g transform="translate(0 {index * _BLOCK})">',
            *_block(title, curves),
            "</g>",
        ]
    return page(elements, width=_WIDTH, height=height, label=label)


def _block(title: str, curves: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield text(_LEFTS[0], 30, title, "title", "start")
    for index, curve in enumerate(curves):
        yield from _legend(curve, _LEFTS[index % 2], 54 + 18 * (index // 2))
    measures = [
        ("forward + backward, s", "s", "seconds", 1.0),
        ("peak memory above inputs and gradients, MiB", "MiB", "extra_peak_bytes", 2.0**20),
    ]
    for left, (name, unit, field, per_unit) in zip(_LEFTS, measures, strict=True):
        lines = [
            (curve, [(p["rows"], p[field] / per_unit) for p in curve["points"] if p[field] > 0])
            for curve in curves
        ]
        yield from _panel(left, name, unit, lines)


def _name(curve: Mapping[str, Any]) -> str:
    return f"{curve['function']}, {curve['form']}"


def _kind(curve: Mapping[str, Any]) -> str:
    dashed = " dashed" if curve["form"] == "sigmoid" else ""
    return f"{'ours' if curve['function'] == OURS else 'others'}{dashed}"


def _legend(curve: Mapping[str, Any], left: float, y: float) -> Iterator[str]:
    yield f'<path class="line {_kind(curve)}" d="M{left} {y - 4}h28"/>'
    name = _name(curve)
    if curve["stops_at"] is not None:
        name += f" (no memory for N = {curve['stops_at']:,})"
    yield text(left + 36, y, name, "name", "start")


def _panel(
    left: float,
    name: str,
    unit: str,
    lines: Sequence[tuple[Mapping[str, Any], list[tuple[int, float]]]],
) -> Iterator[str]:
    width, height = _PANEL
    bottom = _TOP + height
    points = [point for _, curve in lines for point in curve]
    if not points:
        return
    counts = sorted({count for count, _ in points})
    decades = powers_of_ten([value for _, value in points])
    x = Axis(counts[0] / 1.2, counts[-1] * 1.2, left, width)
    y = Axis(decades[0], decades[-1], bottom, -height)
    yield text(left, _TOP - 12, name, "name", "start")
    yield text(left + width / 2, bottom + 40, "N, pairs", "", "middle")
    for value in decades:
        yield f'<path class="grid" d="M{left} {y.place(value):.1f}h{width}"/>'
        yield text(left - 8, y.place(value) + 4, f"{value:,.10g}", "", "end")
    step = math.ceil(len(counts) / 6)  # labels side by side
    for count in counts[::-1][::step]:
        yield f'<path class="grid" d="M{x.place(count):.1f} {bottom}v5"/>'
        yield text(x.place(count), bottom + 20, f"{count:,}", "", "middle")
    for curve, values in lines:
        places = [(x.place(count), y.place(value)) for count, value in values]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        yield f'<polyline class="line {_kind(curve)}" points="{path}"/>'
        for (px, py), (count, value) in zip(places, values, strict=True):
            tip = escape(f"{_name(curve)}, N = {count:,}: {value:.3g} {unit}")
            yield (
                f'<circle class="{_kind(curve)}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
                f"<title>{tip}</title></circle>"
            )
