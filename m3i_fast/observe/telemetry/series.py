"""Sampled values over a window of time: statistics of a gauge, growth of a counter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]  # seconds of time.monotonic(), value


def gauge_statistics(values: Sequence[float]) -> dict[str, float]:
    """Return mean, min, max and p95 of one value or more.

    p95 is the least value that 95 % of the values do not exceed.
    """
    ordered = sorted(values)
    num_below = -(-95 * len(ordered) // 100)
    return {
        "mean": sum(ordered) / len(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "p95": ordered[num_below - 1],
    }


def growth(points: Sequence[Point], begin_s: float, end_s: float) -> float | None:
    """Return the growth of a counter from begin to end; None where less than half was sampled.

    Between samples it is interpolated. Outside the samples the counter is taken to grow at the rate
    of the sampled part of the window. A counter that fell was reset: its new value is added.
    """
    first_s, last_s = max(begin_s, points[0][0]), min(end_s, points[-1][0])
    sampled_s, window_s = last_s - first_s, end_s - begin_s
    if window_s <= 0 or sampled_s < window_s / 2:
        return None
    total = 0.0
    for (left_s, before), (right_s, after) in pairwise(points):
        inside_s = min(right_s, last_s) - max(left_s, first_s)
        if inside_s > 0:
            added = after - before if after >= before else after
            total += added * inside_s / (right_s - left_s)
    return total * window_s / sampled_s


def integral(points: Sequence[Point]) -> list[Point]:
    """Return the counter whose rate of growth these points are, by the trapezoid rule."""
    total, counter = 0.0, [(points[0][0], 0.0)]
    for (left_s, before), (right_s, after) in pairwise(points):
        total += (before + after) / 2 * (right_s - left_s)
        counter.append((right_s, total))
    return counter
