"""Lines of the methods' table as one SVG: a panel a measure, the methods in its order.

Self-contained, and readable on light and dark pages. M3I is a full line through the panel; a bar
about another's point is the 95 % interval of its difference to M3I: where it does not reach the
line, the two differ.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core.svg import Axis, page, round_values, text
from m3i_fast.benchmarks.methods.table import OTHERS, OURS, Line, measures, title

_WIDTH, _TOP = 920, 84  # pixels
_NAMES, _PANEL = 150, 250  # widths of a panel's names and of its plot
_LEFTS = (20, 480)
_LINE, _HEAD, _FOOT = 17, 34, 44  # heights of a method, and of what is above and below a panel's


def draw(lines: Sequence[Line], heading: str, *, shown: Container[str] = ()) -> str:
    """Return the SVG of a table's lines; `shown` as of `table`.

    Raises ValueError where no line has a figure.
    """
    names = measures(lines, shown)
    panels = [(name, [line for line in lines if name in line.values]) for name in names]
    if not panels:
        raise ValueError("lines: expected at least one with a figure, got none")
    key = "The line is M3I; a bar that does not reach it is a method that differs from it (95 %)."
    elements = [
        text(_LEFTS[0], 30, heading, "title", "start"),
        text(_LEFTS[0], 52, key, "", "start"),
    ]
    top = _TOP
    for index in range(0, len(panels), 2):
        row = panels[index : index + 2]
        for left, (measure, drawn) in zip(_LEFTS, row, strict=False):
            elements += _panel(left, top, measure, drawn)
        top += _HEAD + _FOOT + _LINE * max(len(drawn) for _, drawn in row)
    return page(elements, width=_WIDTH, height=top, label=heading)


def _panel(left: float, top: float, measure: str, lines: Sequence[Line]) -> Iterator[str]:
    """Methods from the best on top to the last."""
    ordered = sorted(lines, key=lambda line: -line.values[measure])
    ours = next((line.values[measure] for line in lines if line.name == OURS), None)
    bars = {line.name: _bar(line, measure, ours) for line in ordered}
    ends = [x for line in ordered for x in (line.values[measure], *(bars[line.name] or ()))]
    marks = round_values(min(ends), max(ends))
    start, first = left + _NAMES, top + _HEAD
    bottom = first + _LINE * len(ordered)

    place = Axis(marks[0], marks[-1], start, _PANEL, linear=True).place
    yield text(left, top + 14, title(measure), "name", "start")
    for value in marks:
        yield f'<path class="grid" d="M{place(value):.1f} {first}V{bottom}"/>'
        yield text(place(value), bottom + 16, f"{value:.10g}", "", "middle")
    if ours is not None:
        yield f'<path class="ours" d="M{place(ours):.1f} {first}V{bottom}"/>'
    for index, line in enumerate(ordered):
        y, value, bar = first + _LINE * (index + 0.5), line.values[measure], bars[line.name]
        kind = _kind(line)
        yield text(start - 10, y + 4, line.name, "ours" if line.name == OURS else "", "end")
        tip = f"{line.name}: {value:.3g}"
        if bar is not None:
            minus = line.minus[measure]
            tip += (
                f"; M3I minus this: {minus.difference:+.3g}, {minus.low:+.3g} to {minus.high:+.3g}"
            )
            ends_x = f"M{place(bar[0]):.1f} {y:.1f}H{place(bar[1]):.1f}"
            yield f'<path class="line {kind}" d="{ends_x}"/>'
        yield (
            f'<circle class="{kind}" cx="{place(value):.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(tip)}</title></circle>"
        )


def _bar(line: Line, measure: str, ours: float | None) -> tuple[float, float] | None:
    """Return the ends of the interval of M3I's difference, seen from M3I's value."""
    if ours is None or measure not in line.minus:
        return None
    return ours - line.minus[measure].high, ours - line.minus[measure].low


def _kind(line: Line) -> str:
    if line.name == OURS:
        return "ours"
    return "neutral" if line.name in OTHERS else "others"
