"""Lines of the methods' table as one SVG: a panel a measure, the methods in its order.

Self-contained, and readable on light and dark pages. M3I is a full line through the panel; a bar
about another's point is the 95 % interval of its difference to M3I: where it does not reach the
line, the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.methods.table import OTHERS, OURS, Line, measures, title

_WIDTH, _TOP = 920, 84  # pixels
_NAMES, _PANEL = 150, 250  # widths of a panel's names and of its plot
_LEFTS = (20, 480)
_LINE, _HEAD, _FOOT = 17, 34, 44  # heights of a method, and of what is above and below a panel's
_NUM_TICKS = 4
# Not by variables: viewers other than browsers do not know them.
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #66635c; }
.paper { fill: #fcfbf9; }
.title, .name { fill: #1f1e1b; }
.title { font-size: 15px; font-weight: 600; }
.grid { stroke: #e5e2db; }
.bar { stroke-width: 2; stroke: #b0501a; }
.curve { stroke-width: 2; stroke: #b0501a; fill: none; }
circle { fill: #b0501a; }
path.untrained { stroke: #8d897f; }
circle.untrained { fill: #8d897f; }
path.ours { stroke: #0b6f68; }
circle.ours { fill: #0b6f68; }
text.ours { fill: #0b6f68; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  text { fill: #a5a198; }
  .paper { fill: #171614; }
  .title, .name { fill: #e9e6df; }
  .grid { stroke: #35332f; }
  .bar, .curve { stroke: #e9985c; }
  circle { fill: #e9985c; }
  path.ours { stroke: #57c4b8; }
  circle.ours { fill: #57c4b8; }
  text.ours { fill: #57c4b8; }
}
"""


def draw(lines: Sequence[Line], heading: str, *, shown: Container[str] = ()) -> str:
    """The SVG of a table's lines, `shown` as of `table`. ValueError where no line has a figure."""
    names = measures(lines, shown)
    panels = [(name, [line for line in lines if name in line.values]) for name in names]
    if not panels:
        raise ValueError("lines: expected at least one with a figure, got none")
    parts: list[str] = []
    top = _TOP
    for index in range(0, len(panels), 2):
        row = panels[index : index + 2]
        for left, (measure, drawn) in zip(_LEFTS, row, strict=False):
            parts += _panel(left, top, measure, drawn)
        top += _HEAD + _FOOT + _LINE * max(len(drawn) for _, drawn in row)
    key = "The line is M3I; a bar that does not reach it is a method that differs from it (95 %)."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
            f'width="{_WIDTH}" height="{top}" role="img" aria-label="{escape(heading)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{_WIDTH}" height="{top}"/>',
            text(_LEFTS[0], 30, heading, "title", "start"),
            text(_LEFTS[0], 52, key, "", "start"),
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(left: float, top: float, measure: str, lines: Sequence[Line]) -> Iterator[str]:
    """Methods from the best on top to the last."""
    ordered = sorted(lines, key=lambda line: -line.values[measure])
    ours = next((line.values[measure] for line in lines if line.name == OURS), None)
    bars = {line.name: _bar(line, measure, ours) for line in ordered}
    ends = [x for line in ordered for x in (line.values[measure], *(bars[line.name] or ()))]
    marks = ticks(min(ends), max(ends))
    start, first = left + _NAMES, top + _HEAD
    bottom = first + _LINE * len(ordered)

    def place(value: float) -> float:
        return start + _PANEL * (value - marks[0]) / (marks[-1] - marks[0])

    yield text(left, top + 14, title(measure), "name", "start")
    for value in marks:
        yield f'<path class="grid" d="M{place(value):.1f} {first}V{bottom}"/>'
        yield text(place(value), bottom + 16, f"{value:.10g}", "", "middle")
    if ours is not None:
        yield f'<path class="ours" d="M{place(ours):.1f} {first}V{bottom}"/>'
    for index, line in enumerate(ordered):
        y, value, bar = first + _LINE * (index + 0.5), line.values[measure], bars[line.name]
        kind = _kind(line)
        yield text(start - 10, y + 4, line.name, kind, "end")
        tip = f"{line.name}: {value:.3g}"
        if bar is not None:
            found = line.minus[measure]
            tip += (
                f"; M3I minus this: {found.difference:+.3g}, {found.low:+.3g} to {found.high:+.3g}"
            )
            ends_x = f"M{place(bar[0]):.1f} {y:.1f}H{place(bar[1]):.1f}"
            yield f'<path class="bar {kind}" d="{ends_x}"/>'
        yield (
            f'<circle class="{kind}" cx="{place(value):.1f}" cy="{y:.1f}" r="3.5">'
            f"<title>{escape(tip)}</title></circle>"
        )


def _bar(line: Line, measure: str, ours: float | None) -> tuple[float, float] | None:
    """The ends of the interval of M3I's difference, seen from M3I's value."""
    if ours is None or measure not in line.minus:
        return None
    return ours - line.minus[measure].high, ours - line.minus[measure].low


def _kind(line: Line) -> str:
    if line.name == OURS:
        return "ours"
    return "untrained" if line.name in OTHERS else "method"


def ticks(low: float, high: float) -> list[float]:
    """Round values around both, a few."""
    rough = max(high - low, 1e-9) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]


def text(x: float, y: float, shown: str, kind: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} class="{kind}" text-anchor="{anchor}">{escape(shown)}</text>'
