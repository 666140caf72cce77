"""The ledger in the formats of other tools: MLPerf's log lines, pytest-benchmark's JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.readme_tables import OURS

# ---- MLPerf --------------------------------------------------------------------------------------


def mllog() -> str:
    """Return each row as a line of MLPerf's logger: a point in time, its figures as the value."""
    lines = [
        f":::MLLOG {json.dumps(_event(row))}"
        for subject in ledger.subjects()
        for row in ledger.read_rows(subject)
    ]
    return "".join(f"{line}\n" for line in lines)


def _event(row: ledger.Row) -> dict[str, Any]:
    settings = {"machine_class": row["machine_class"], **ledger.settings_of(row)}
    return {
        "namespace": "m3i_fast",
        "time_ms": round(datetime.fromisoformat(row["time"]).timestamp() * 1000),
        "event_type": "POINT_IN_TIME",
        "key": row["subject"],
        "value": {
            name: value
            for name, value in row["figures"].items()
            if name not in settings and name != "hits"
        },
        "metadata": {
            "file": f"benchmarks/{row['subject']}.py",
            "lineno": 1,
            "commit": ledger.commit_of(row),
            "command": row["command"],
            **settings,
        },
    }


# ---- pytest-benchmark ----------------------------------------------------------------------------


def pytest_benchmark() -> str:
    """Return our newest times with samples, of this machine class, in seconds.

    ValueError where the ledger has none: rows of before samples were kept have no statistics.
    """
    here = ledger.make_row("page", {})
    suites: dict[str, dict[str, Any]] = {}
    for subject in ledger.subjects():
        for row in ledger.read_rows(subject):
            timing = row["figures"].get("timings", {}).get(OURS, {})
            if timing.get("samples_ms") and row["machine_class"] == here["machine_class"]:
                entry = _entry(row, timing["samples_ms"])
                suites[entry["fullname"]] = entry
    if not suites:
        raise ValueError(
            f"no row with samples of {here['machine_class']}: benchmarks append some, "
            "m3i-fast bench mask_mix for one"
        )
    return json.dumps(
        {
            "machine_info": _machine(here),
            "commit_info": {
                "id": here["commit"],
                "time": here["time"],
                "author_time": here["time"],
                "dirty": here["dirty"],
                "project": "m3i-fast",
                "branch": "unknown",
            },
            "benchmarks": list(suites.values()),
            "datetime": here["time"],
            "version": "5.3.1",
        },
        indent=2,
    )


def _machine(row: ledger.Row) -> dict[str, Any]:
    machine, versions = row["machine"], row["versions"]
    return {
        "node": machine["host"],
        "processor": machine["cpu"],
        "machine": row["machine_class"],
        "python_implementation": "CPython",
        "python_version": versions["python"],
        "cpu": {"brand_raw": machine["cpu"], "count": machine["num_cores"]},
        "torch": versions["torch"],
    }


def _entry(row: ledger.Row, samples_ms: list[float]) -> dict[str, Any]:
    settings = ledger.settings_of(row)
    param = "-".join(map(str, settings.values()))
    name = f"{row['subject']}[{param}]"
    return {
        "group": row["subject"],
        "name": name,
        "fullname": f"benchmarks/{row['subject']}.py::{name}",
        "params": settings,
        "param": param,
        "extra_info": {"commit": ledger.commit_of(row), "command": row["command"]},
        "options": {
            "disable_gc": False,
            "timer": "perf_counter",
            "min_rounds": len(samples_ms),
            "max_time": 0.0,
            "min_time": 0.0,
            "warmup": True,
        },
        "stats": dict(stats([sample / 1e3 for sample in samples_ms])),
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    """Medians of both halves: the mean of with and without the middle value, as theirs."""
    ordered, half = sorted(values), len(values) // 2
    if not half:
        return ordered[0], ordered[0]
    lower = ordered[:half], ordered[: len(ordered) - half]
    upper = ordered[half:], ordered[len(ordered) - half :]
    first, third = (statistics.fmean(map(statistics.median, halves)) for halves in (lower, upper))
    return first, third


def stats(seconds: list[float]) -> Iterator[tuple[str, Any]]:
    """pytest-benchmark's statistics; outliers by Tukey's fences."""
    (q1, q3), median = _quartiles(seconds), statistics.median(seconds)
    several = len(seconds) > 1
    mean, stddev = statistics.fmean(seconds), statistics.stdev(seconds) if several else 0.0
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    beyond = {
        "stddev_outliers": sum(abs(x - mean) > stddev for x in seconds),
        "iqr_outliers": sum(not low <= x <= high for x in seconds),
    }
    inside: Mapping[str, float] = {
        "ld15iqr": min(x for x in seconds if x >= low),
        "hd15iqr": max(x for x in seconds if x <= high),
    }
    yield from {"min": min(seconds), "max": max(seconds), "mean": mean, "stddev": stddev}.items()
    yield from {"rounds": len(seconds), "median": median, "iqr": q3 - q1}.items()
    yield from {"q1": q1, "q3": q3, **beyond, **inside}.items()
    yield "outliers", f"{beyond['stddev_outliers']};{beyond['iqr_outliers']}"
    yield from {"ops": 1 / mean, "total": sum(seconds), "iterations": 1, "data": seconds}.items()
