"""Sampled values over a window of time: spread of a gauge, growth of a counter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]  # seconds of time.monotonic(), value


def spread(values: Sequence[float]) -> dict[str, float]:
    """mean, min, max and p95 (the least value that 95 % are no larger than) of at least one."""
    ordered = sorted(values)
    rank = -(-95 * len(ordered) // 100)
    return {
        "mean": sum(ordered) / len(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "p95": ordered[rank - 1],
    }


def growth(points: Sequence[Point], begin_s: float, end_s: float) -> float | None:
    """By how much a counter grew from begin to end; None where too little of it was seen.

    Between samples it grows evenly. What of the window lies before the first sample or after the
    last grows at the rate of the rest, which is at least half of it. A counter that fell began
    anew: at least its new value was added.
    """
    begun, ended = max(begin_s, points[0][0]), min(end_s, points[-1][0])
    seen_s, window_s = ended - begun, end_s - begin_s
    if window_s <= 0 or seen_s < window_s / 2:
        return None
    total = 0.0
    for (left_s, before), (right_s, after) in pairwise(points):
        inside_s = min(right_s, ended) - max(left_s, begun)
        if inside_s > 0:
            added = after - before if after >= before else after
            total += added * inside_s / (right_s - left_s)
    return total * window_s / seen_s


def integral(points: Sequence[Point]) -> list[Point]:
    """The counter whose rate of growth these are, by trapezoids."""
    total, found = 0.0, [(points[0][0], 0.0)]
    for (left_s, before), (right_s, after) in pairwise(points):
        total += (before + after) / 2 * (right_s - left_s)
        found.append((right_s, total))
    return found
