"""How a few methods' figures grow with the training time, as one SVG: a panel a measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.methods.plot import STYLE, text, ticks
from m3i_fast.benchmarks.methods.table import OTHERS, OURS, Line, measures, title

GROWTH = (1 / 3, 1.0, 3.0, 9.0)  # of the budget

_WIDTH, _TOP, _HEIGHT = 920, 84, 250  # pixels; of the whole, above the panels, of a panel
_LEFTS = (60, 520)
_PLOT, _TALL = 240, 170  # a panel's axes
_LABEL = 15  # least distance of two names
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


def draw_growth(found: Mapping[str, Sequence[Line]]) -> str:
    """The SVG of lines by budget, the shortest first. ValueError where there is no figure."""
    budgets = list(found)
    names = list(dict.fromkeys(line.name for lines in found.values() for line in lines))
    shown = [n for n in names if n not in OTHERS]
    columns = measures([line for lines in found.values() for line in lines])
    if not shown or not columns:
        raise ValueError("lines: expected at least one with a figure, got none")
    heading = f"{', '.join(shown)}: {budgets[0]} to {budgets[-1]}"
    height = _TOP + _HEIGHT * -(-len(columns) // 2)
    parts: list[str] = []
    for index, measure in enumerate(columns):
        curves = {
            name: [
                next((x.values.get(measure) for x in lines if x.name == name), None)
                for lines in found.values()
            ]
            for name in shown
        }
        left, top = _LEFTS[index % 2], _TOP + _HEIGHT * (index // 2)
        parts += _panel(left, top, measure, [b.split(" on ")[0] for b in budgets], curves)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img" aria-label="{escape(heading)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
            text(20, 30, heading, "title", "start"),
            text(20, 52, "Training of one core, each time three times the last.", "", "start"),
            *parts,
            "</svg>",
            "",
        ]
    )


def _panel(
    left: float,
    top: float,
    measure: str,
    budgets: Sequence[str],
    curves: Mapping[str, Sequence[float | None]],
) -> Iterator[str]:
    values = [v for curve in curves.values() for v in curve if v is not None]
    marks = ticks(min(values), max(values))
    bottom = top + 30 + _TALL

    def place(index: int, value: float) -> tuple[float, float]:
        share = (value - marks[0]) / (marks[-1] - marks[0])
        return left + _PLOT * index / max(len(budgets) - 1, 1), bottom - _TALL * share

    yield text(left, top + 14, title(measure), "name", "start")
    for value in marks:
        y = place(0, value)[1]
        yield f'<path class="grid" d="M{left} {y:.1f}h{_PLOT}"/>'
        yield text(left - 8, y + 4, f"{value:.10g}", "", "end")
    for index, budget in enumerate(budgets):
        yield text(place(index, marks[0])[0], bottom + 18, budget, "", "middle")
    ends: list[tuple[float, str]] = []
    for number, (name, curve) in enumerate(curves.items()):
        points = [(*place(i, v), v) for i, v in enumerate(curve) if v is not None]
        if not points:
            continue
        kind = "ours" if name == OURS else "method"
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in points)
        dash = f' stroke-dasharray="{_DASHES[number % len(_DASHES)]}"' if number else ""
        yield f'<path class="curve {kind}" d="{path}"{dash}/>'
        for x, y, value in points:
            tip = f"<title>{escape(name)}: {value:.3g}</title>"
            yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>'
        ends.append((points[-1][1], name))
    last = -_LABEL * 1e3
    for y, name in sorted(ends):
        last = max(y, last + _LABEL)
        kind = "ours" if name == OURS else ""
        yield text(left + _PLOT + 10, last + 4, name, kind, "start")
