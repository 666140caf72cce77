"""Comparisons of `verdict` as SVGs: every seed, means and differences, and curves over label share.

Self-contained, and readable on light and dark pages. M3I has the accent colour.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from xml.sax.saxutils import escape

from m3i_fast.benchmarks.core.svg import Axis, page, round_values, text
from m3i_fast.benchmarks.one_stage.verdict import MARGIN, OURS, Comparison, Estimate

_WIDTH, _TOP = 920, 84  # pixels; of the whole, above the first panel
_LINE, _HEAD, _FOOT = 24, 34, 48  # heights of an arm, and of what is above and below a panel's
_NAMES, _PLOT = 150, 270  # widths of the arms' names and of a panel's axes
_LEFTS = (170, 620)  # of the axes of figures and of differences
_SHARE_LEFTS, _SHARE_PLOT, _SHARE_TALL, _SHARE_HEIGHT = (60, 520), 250, 190, 270
_SHARES = (0.01, 0.03, 0.1, 1.0)  # of the experiment, for which there is room
_LABEL = 15  # least distance of two names
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "1 4", "5 2 1 2")


# ---- One share -----------------------------------------------------------------------------------


def draw(sets: Mapping[str, Comparison], heading: str, *, ours: str = OURS) -> str:
    """Return the SVG of every set's arms: all seeds and means, and what `ours` is better by.

    Raises ValueError where there is no set.
    """
    if not sets:
        raise ValueError("sets: expected at least one, got none")
    key = (
        "Left: hollow, every seed; full, the mean with its 95 % interval. Right: "
        f"{ours} minus each arm, 95 %; dashed, {MARGIN:g} point."
    )
    elements = [text(20, 30, heading, "title", "start"), text(20, 52, key, "", "start")]
    top = _TOP
    for each in sets.values():
        elements += _figures(top, each, ours)
        elements += _differences(top, each, ours)
        top += _HEAD + _FOOT + _LINE * (len(each.means) + 1)
    return page(elements, width=_WIDTH, height=top, label=heading)


def _ordered(each: Comparison) -> list[str]:
    """Return the arms from the best to the last."""
    return sorted(each.means, key=lambda arm: -each.means[arm].value)


def _figures(top: float, each: Comparison, ours: str) -> Iterator[str]:
    arms, first = _ordered(each), top + _HEAD
    values = [v for of_seeds in each.by_seed.values() for v in of_seeds]
    values += [end for mean in each.means.values() for end in (mean.low, mean.high)]
    words = f"{each.measure} ({len(each.seeds)} seeds, {each.num_clusters:,} clusters)"
    yield text(20, top + 14, words, "name", "start")
    axis, grid = _axis(_LEFTS[0], first, len(arms), values)
    yield from grid
    for index, arm in enumerate(arms):
        y, kind = first + _LINE * (index + 0.5), _kind(arm, ours)
        yield text(_LEFTS[0] - 12, y + 4, arm, "ours" if arm == ours else "", "end")
        for seed, value in zip(each.seeds, each.by_seed[arm], strict=True):
            tip = f"{arm}, seed {seed}: {value:.1f}"
            yield _dot(axis.place(value), y + 6, f"{kind} hollow", tip, radius=2.5)
        yield from _bar(axis, y - 3, each.means[arm], kind, f"{arm}: {_plain(each.means[arm])}")


def _differences(top: float, each: Comparison, ours: str) -> Iterator[str]:
    rows = {arm: each.minus[arm] for arm in _ordered(each) if arm in each.minus}
    rows["best other"] = each.minus_best
    first = top + _HEAD
    values = [end for row in rows.values() for end in (row.low, row.high)]
    yield text(_LEFTS[1] - _NAMES, top + 14, f"{ours} minus", "name", "start")
    axis, grid = _axis(_LEFTS[1], first, len(rows), [*values, 0.0, MARGIN])
    yield from grid
    bottom = first + _LINE * len(rows)
    for value, kind in ((0.0, "line neutral"), (MARGIN, "line neutral dashed")):
        yield f'<path class="{kind}" d="M{axis.place(value):.1f} {first}V{bottom}"/>'
    for index, (name, row) in enumerate(rows.items()):
        y, best = first + _LINE * (index + 0.5), name == "best other"
        kind = "ours" if best else "others"
        yield text(_LEFTS[1] - 12, y + 4, name, "ours" if best else "", "end")
        yield from _bar(axis, y, row, kind, f"{ours} minus {name}: {row}")


def _axis(
    left: float, first: float, num_lines: int, values: Sequence[float]
) -> tuple[Axis, list[str]]:
    """Return a horizontal axis about the values, and its grid."""
    marks = round_values(min(values), max(values))
    axis = Axis(marks[0], marks[-1], left, _PLOT, linear=True)
    bottom = first + _LINE * num_lines
    grid = []
    for value in marks:
        grid += [
            f'<path class="grid" d="M{axis.place(value):.1f} {first}V{bottom}"/>',
            text(axis.place(value), bottom + 16, f"{value:.10g}", "", "middle"),
        ]
    return axis, grid


def _bar(axis: Axis, y: float, row: Estimate, kind: str, tip: str) -> Iterator[str]:
    ends = f"M{axis.place(row.low):.1f} {y:.1f}H{axis.place(row.high):.1f}"
    yield f'<path class="line {kind}" d="{ends}"/>'
    yield _dot(axis.place(row.value), y, kind, tip)


def _dot(x: float, y: float, kind: str, tip: str, *, radius: float = 4) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
    return f'<circle class="{kind}" {place}><title>{escape(tip)}</title></circle>'


def _kind(arm: str, ours: str) -> str:
    return "ours" if arm == ours else "others"


def _plain(mean: Estimate) -> str:
    return f"{mean.value:.1f} ({mean.low:.1f} to {mean.high:.1f})"


# ---- Over label share ----------------------------------------------------------------------------


def draw_shares(
    of_share: Mapping[float, Mapping[str, Comparison]], heading: str, *, ours: str = OURS
) -> str:
    """Return the SVG of means against the share of labels, 0 to 1, a panel a set, a curve an arm.

    What was not run is left out: an arm or a set may be there for some shares alone. Raises
    ValueError where there is nothing to draw.
    """
    sets = list(dict.fromkeys(name for by_set in of_share.values() for name in by_set))
    if not sets:
        raise ValueError("of_share: expected at least one comparison, got none")
    shares = sorted({*_SHARES, *of_share})
    key = f"Means over seeds; bars: the 95 % interval of {ours} minus the arm, from {ours}'s mean."
    elements = [text(20, 30, heading, "title", "start"), text(20, 52, key, "", "start")]
    for index, name in enumerate(sets):
        left, top = _SHARE_LEFTS[index % 2], _TOP + _SHARE_HEIGHT * (index // 2)
        by_share = {
            share: of_share[share][name] for share in shares if name in of_share.get(share, ())
        }
        elements += _share_panel(left, top, shares, by_share, ours)
    height = _TOP + _SHARE_HEIGHT * -(-len(sets) // 2)
    return page(elements, width=_WIDTH, height=height, label=heading)


def _share_panel(
    left: float,
    top: float,
    shares: Sequence[float],  # of all sets, so that panels have one axis
    by_share: Mapping[float, Comparison],
    ours: str,
) -> Iterator[str]:
    arms = list(dict.fromkeys(arm for each in by_share.values() for arm in each.means))
    arms.sort(key=lambda arm: arm != ours)
    bars = {
        arm: {share: bar for share, c in by_share.items() if (bar := _seen(c, arm, ours))}
        for arm in arms
    }
    values = [end for of in bars.values() for bar in of.values() for end in (bar.low, bar.high)]
    marks = round_values(min(values), max(values))
    bottom = top + 30 + _SHARE_TALL
    x = Axis(shares[0], shares[-1], left + 12, _SHARE_PLOT - 50)
    y = Axis(marks[0], marks[-1], bottom, -_SHARE_TALL, linear=True)
    yield text(left, top + 14, next(iter(by_share.values())).measure, "name", "start")
    for mark in marks:
        yield f'<path class="grid" d="M{left} {y.place(mark):.1f}h{_SHARE_PLOT}"/>'
        yield text(left - 8, y.place(mark) + 4, f"{mark:.10g}", "", "end")
    for share in shares:
        yield text(x.place(share), bottom + 18, f"{100 * share:g} %", "", "middle")
    yield text(left + _SHARE_PLOT / 2, bottom + 36, "share of labels", "", "middle")
    ends: list[tuple[float, str]] = []
    for index, arm in enumerate(arms):
        yield from _curve(x, y, arm, bars[arm], index, _kind(arm, ours))
        ends.append((y.place(list(bars[arm].values())[-1].value), arm))
    last = -float("inf")
    for end, arm in sorted(ends):
        last = max(end, last + _LABEL)
        kind = "ours" if arm == ours else ""
        yield text(left + _SHARE_PLOT + 8, last + 4, arm, kind, "start")


def _seen(each: Comparison, arm: str, ours: str) -> Estimate | None:
    """Return an arm's mean with the interval of its difference, None where it was not run."""
    if arm not in each.means:
        return None
    mean, start = each.means[arm].value, each.means[ours].value
    if arm == ours:
        return Estimate(value=mean, low=mean, high=mean)
    minus = each.minus[arm]
    return Estimate(value=mean, low=start - minus.high, high=start - minus.low)


def _curve(
    x: Axis, y: Axis, arm: str, bars: Mapping[float, Estimate], index: int, kind: str
) -> Iterator[str]:
    places = [(x.place(share) + 3 * index, bar) for share, bar in bars.items()]
    path = "L".join(f"{place:.1f} {y.place(bar.value):.1f}" for place, bar in places)
    dash = f' stroke-dasharray="{_DASHES[index % len(_DASHES)]}"' if index else ""
    yield f'<path class="line {kind}" d="M{path}"{dash}/>'
    for (place, bar), share in zip(places, bars, strict=True):
        if bar.low < bar.high:
            ends = f"M{place:.1f} {y.place(bar.low):.1f}V{y.place(bar.high):.1f}"
            yield f'<path class="line {kind}" stroke-opacity="0.5" d="{ends}"/>'
        tip = f"{arm}, {100 * share:g} % of labels: {bar.value:.1f}"
        yield _dot(place, y.place(bar.value), kind, tip, radius=3)
