"""The ledger's rows as series over time: what was measured alike, on machines of one class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from m3i_fast.benchmarks import ledger
from m3i_fast.benchmarks.readme import OURS, rates_of


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement; low and high are its spread, where the row has one."""

    time: str
    commit: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """Measurements of one thing, oldest first."""

    subject: str
    machine_class: str
    name: str
    """The settings, and the measure where it is not the time of ours."""
    unit: str
    points: list[Point] = field(default_factory=list)


def series_of(subject: str) -> list[Series]:
    """Times of ours, rates, single figures in ms or a second; those measured last come first."""
    found: dict[tuple[str, str, str], Series] = {}
    for row in ledger.read_rows(subject):
        settings = _words(row)
        for measure, unit, point in _points(row):
            name = ", ".join(filter(None, (settings, measure)))
            key = row["machine_class"], json.dumps(ledger.settings_of(row), sort_keys=True), measure
            series = found.pop(key, None) or Series(subject, row["machine_class"], name, unit)
            series.points.append(point)
            found[key] = series  # moves to the end
    return list(reversed(found.values()))


def _words(row: ledger.Row) -> str:
    """`56 x 56 x 64` would need each subject's own words: names and values serve all."""
    left_out = ("device", "teacher", "recipe", "kind")
    return ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in ledger.settings_of(row).items()
        if name not in left_out and value is not None
    )


def _points(row: ledger.Row) -> Iterator[tuple[str, str, Point]]:
    """(measure, unit, point) of all that a row measured."""
    figures = row["figures"]
    made = row["time"], ledger.commit_of(row)
    timing = figures.get("timings", {}).get(OURS)
    if timing:
        spread = timing["p20_ms"], timing["p80_ms"]
        yield "", "ms", Point(*made, timing["median_ms"], *spread)
        return
    for path, rate in rates_of(figures):
        yield path, "a second", Point(*made, rate["median"], rate["ci_low"], rate["ci_high"])
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name.endswith("_ms"):
            yield name.removesuffix("_ms").replace("_", " "), "ms", Point(*made, value)
        elif name.endswith("_per_s"):
            yield name.removesuffix("_per_s").replace("_", " "), "a second", Point(*made, value)
