"""What each term did while its arm trained, as one SVG: pull on the encoder, variance explained.

A panel an arm; stages stand one after the other. Dense terms and views have the accent colour,
terms that see annotations the other one. Self-contained, and readable on light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core.svg import Axis, page, powers_of_ten, round_values, text

Parts = Sequence[float | None]
_WIDTH, _TOP, _LEFT = 920, 84, 66  # pixels; of the whole, above the first panel, left of it
_COLUMN, _NAMES = 170, 62  # widths of an arm, and of the terms' names in it
_HEAD, _TALL, _FOOT = 40, 110, 34  # heights above a panel, of its axes, and below it
_LABEL = 13  # least distance of two names
_DASHES = ("", "6 3")
_ANNOTATED = ("category", "caption")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTerms:
    """What a stage's terms logged: term -> means of equal parts of its steps, in order."""

    share: float
    """Of the arm's time."""
    gradient: Mapping[str, Parts]
    """Norm of the weighted term's gradient by the shared encoder."""
    explained: Mapping[str, Parts]
    """Share of the targets' variance that a dense term's prediction explains."""


def draw_terms(
    sets: Mapping[str, Mapping[str, Sequence[StageTerms]]],  # set -> arm -> its stages
    heading: str,
) -> str:
    """Return the SVG: for each set a row of gradient norms, and one of explained variance.

    Raises ValueError where there is nothing to draw.
    """
    if not any(stages for arms in sets.values() for stages in arms.values()):
        raise ValueError("sets: expected at least one stage, got none")
    key = "Means over seeds, from the first to the last fifth of each stage."
    elements = [text(20, 30, heading, "title", "start"), text(20, 52, key, "", "start")]
    top = _TOP
    for name, arms in sets.items():
        for words, of in (("pull on the encoder", "gradient"), ("variance explained", "explained")):
            lines = {arm: _lines(stages, of) for arm, stages in arms.items()}
            lines = {arm: those for arm, those in lines.items() if those}
            if lines:
                elements += _row(top, f"{name}: {words}", lines, is_log=of == "gradient")
                top += _HEAD + _TALL + _FOOT
    columns = max(len(arms) for arms in sets.values())
    width = max(_WIDTH, _LEFT + _COLUMN * columns)
    return page(elements, width=width, height=top, label=heading)


Line = list[tuple[float, float]]  # of time 0 to 1, value


def _lines(stages: Sequence[StageTerms], of: str) -> dict[str, list[Line]]:
    """Return each term's lines, one for each stage that has it."""
    found: dict[str, list[Line]] = {}
    whole, began = sum(stage.share for stage in stages), 0.0
    for stage in stages:
        values: Mapping[str, Parts] = getattr(stage, of)
        share = stage.share / whole
        for term, parts in values.items():
            line = [
                (began + share * (i + 0.5) / len(parts), value)
                for i, value in enumerate(parts)
                if value is not None and (of != "gradient" or value > 0)
            ]
            if line:
                found.setdefault(term, []).append(line)
        began += share
    return found


def _row(
    top: float, words: str, lines: Mapping[str, Mapping[str, list[Line]]], *, is_log: bool
) -> Iterator[str]:
    values = [
        y for of in lines.values() for those in of.values() for line in those for _, y in line
    ]
    marks = powers_of_ten(values) if is_log else round_values(min(0.0, *values), max(values))
    bottom = top + _HEAD + _TALL
    axis = Axis(marks[0], marks[-1], bottom, -_TALL, linear=not is_log)
    yield text(20, top + 14, words, "name", "start")
    for mark in marks:
        yield text(_LEFT - 8, axis.place(mark) + 4, f"{mark:.10g}", "", "end")
    for column, (arm, of) in enumerate(lines.items()):
        left, long = _LEFT + _COLUMN * column, _COLUMN - _NAMES - 10
        yield text(left, top + 33, arm, "name", "start")
        for mark in marks:
            yield f'<path class="grid" d="M{left} {axis.place(mark):.1f}h{long}"/>'
        yield from _panel(left, long, axis, arm, of)


def _panel(
    left: float, long: float, axis: Axis, arm: str, lines: Mapping[str, list[Line]]
) -> Iterator[str]:
    ends: list[tuple[float, str]] = []
    used: dict[str, int] = {}
    for term, those in lines.items():
        kind = "others" if term in _ANNOTATED else "ours"
        number = used[kind] = used.get(kind, -1) + 1
        dash = _DASHES[number % len(_DASHES)]
        for line in those:
            places = [(left + long * x, axis.place(y)) for x, y in line]
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            style = f' stroke-dasharray="{dash}"' if dash else ""
            tip = f"{arm}, {term}: " + ", ".join(f"{y:.3g}" for _, y in line)
            yield (
                f'<path class="line {kind}" d="M{path}"{style}><title>{escape(tip)}</title></path>'
            )
        ends.append((axis.place(those[-1][-1][1]), term))
    last = -math.inf
    for end, term in sorted(ends):
        last = max(end, last + _LABEL)
        kind = "" if term in _ANNOTATED else "ours"
        yield text(left + long + 4, last + 4, term, kind, "start")
