"""How a few methods' figures grow with the training time, as one SVG: a panel a measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core.svg import Axis, page, round_values, text
from m3i_fast.benchmarks.methods.table import OTHERS, OURS, Line, measures, title

GROWTH = (1 / 3, 1.0, 3.0, 9.0)  # of the budget

_WIDTH, _TOP, _HEIGHT = 920, 84, 250  # pixels; of the whole, above the panels, of a panel
_LEFTS = (60, 520)
_PLOT, _TALL = 240, 170  # a panel's axes
_LABEL = 15  # least distance of two names
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


def draw_growth(lines_of: Mapping[str, Sequence[Line]]) -> str:
    """Return the SVG of lines by budget, the shortest first.

    Raises ValueError where there is no figure.
    """
    budgets = list(lines_of)
    names = list(dict.fromkeys(line.name for lines in lines_of.values() for line in lines))
    shown = [n for n in names if n not in OTHERS]
    columns = measures([line for lines in lines_of.values() for line in lines])
    if not shown or not columns:
        raise ValueError("lines: expected at least one with a figure, got none")
    heading = f"{', '.join(shown)}: {budgets[0]} to {budgets[-1]}"
    height = _TOP + _HEIGHT * -(-len(columns) // 2)
    elements = [
        text(20, 30, heading, "title", "start"),
        text(20, 52, "Training of one core, each time three times the last.", "", "start"),
    ]
    for index, measure in enumerate(columns):
        curves = {
            name: [
                next((x.values.get(measure) for x in lines if x.name == name), None)
                for lines in lines_of.values()
            ]
            for name in shown
        }
        left, top = _LEFTS[index % 2], _TOP + _HEIGHT * (index // 2)
        elements += _panel(left, top, measure, [b.split(" on ")[0] for b in budgets], curves)
    return page(elements, width=_WIDTH, height=height, label=heading)


def _panel(
    left: float,
    top: float,
    measure: str,
    budgets: Sequence[str],
    curves: Mapping[str, Sequence[float | None]],
) -> Iterator[str]:
    values = [v for curve in curves.values() for v in curve if v is not None]
    marks = round_values(min(values), max(values))
    bottom = top + 30 + _TALL

    x = Axis(0, max(len(budgets) - 1, 1), left, _PLOT, linear=True)
    y = Axis(marks[0], marks[-1], bottom, -_TALL, linear=True)

    yield text(left, top + 14, title(measure), "name", "start")
    for value in marks:
        yield f'<path class="grid" d="M{left} {y.place(value):.1f}h{_PLOT}"/>'
        yield text(left - 8, y.place(value) + 4, f"{value:.10g}", "", "end")
    for index, budget in enumerate(budgets):
        yield text(x.place(index), bottom + 18, budget, "", "middle")
    ends: list[tuple[float, str]] = []
    for number, (name, curve) in enumerate(curves.items()):
        points = [(x.place(i), y.place(v), v) for i, v in enumerate(curve) if v is not None]
        if not points:
            continue
        kind = "ours" if name == OURS else "others"
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in points)
        dash = f' stroke-dasharray="{_DASHES[number % len(_DASHES)]}"' if number else ""
        yield f'<path class="line {kind}" d="{path}"{dash}/>'
        for px, py, value in points:
            tip = f"<title>{escape(name)}: {value:.3g}</title>"
            yield f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="3">{tip}</circle>'
        ends.append((points[-1][1], name))
    last = -_LABEL * 1e3
    for end, name in sorted(ends):
        last = max(end, last + _LABEL)
        kind = "ours" if name == OURS else ""
        yield text(left + _PLOT + 10, last + 4, name, kind, "start")
