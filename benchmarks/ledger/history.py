"""The ledger's rows as series over time: what was measured alike, on machines of one class."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.readme_tables import OURS, rates_of


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement; low and high are its spread, where the row has one."""

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
    settings: dict[str, Any]
    measure: str
    """Empty for the time of ours."""
    unit: str
    points: list[Point] = field(default_factory=list)

    def name(self, common: Collection[str] = ()) -> str:
        """Return what tells it from other series of the subject, which share `common`."""
        own = {name: value for name, value in self.settings.items() if name not in common}
        return ", ".join(filter(None, (words(own), self.measure)))


def words(settings: Mapping[str, Any]) -> str:
    """Return settings as words: `batch size 64, dtype float32`."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None
    )


def common_settings(series_list: Sequence[Series]) -> dict[str, Any]:
    """Return the settings that all series share; of a single series, all its settings."""
    first = series_list[0].settings
    return {
        name: value
        for name, value in first.items()
        if all(series.settings.get(name) == value for series in series_list)
    }


def series_of(subject: str) -> list[Series]:
    """Return our times, rates and figures in ms or a second; those measured last come first."""
    series_by_key: dict[tuple[str, str, str], Series] = {}
    for row in ledger.read_rows(subject):
        settings = ledger.settings_of(row)
        for measure, unit, point in _points(row):
            key = row["machine_class"], json.dumps(settings, sort_keys=True), measure
            series = series_by_key.pop(key, None)
            if series is None:
                series = Series(subject, row["machine_class"], settings, measure, unit)
            series.points.append(point)
            series_by_key[key] = series  # moves to the end
    return list(reversed(series_by_key.values()))


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
