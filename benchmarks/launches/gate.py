"""What a case asks for beyond its newest row of the ledger, with the Python lines that are new."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from m3i_fast.benchmarks.launches.counting import (
    ROOT,
    Counted,
    counts_of,
    launches_by_line,
    pageable_copies,
    text_of,
)
from m3i_fast.benchmarks.launches.trace import Record, lines_of
from m3i_fast.benchmarks.ledger import rows as ledger

# Counts repeat exactly, run for run; so many launches may come or go without a new row.
MARGIN = 8
TOLERANCE = 0.10  # of the predicted peak
SUBJECT = "launches"


def newest_row(case_name: str) -> ledger.Row:
    """Return the newest row of a case; ValueError, with the command that makes one, without."""
    row = ledger.newest(ledger.read_rows(SUBJECT), case=case_name)
    if row is None:
        raise ValueError(f"{case_name}: no row in {SUBJECT}.jsonl; {_record(case_name)}")
    return row


def _record(case_name: str) -> str:
    return f"`m3i-fast bench launches --only {case_name!r}` appends one"


def never_in_a_step(counted: Counted) -> list[str]:
    """Return what no steady step may do, a sentence each with its Python lines."""
    step = counted.step
    kinds: dict[str, Iterable[Record]] = {
        "errors, faults or unsupported calls": (
            r for kind in ("error", "fault", "unsupported") for r in step.of(kind)
        ),
        "waits of the host": step.of("wait"),
        "copies of pageable memory": pageable_copies(step),
        "allocations": step.of("allocate"),
    }
    return [
        f"{counted.case.name}: {sum(lines.values())} {what} in a steady step, at {_listed(lines)}"
        for what, records in kinds.items()
        if (lines := lines_of(records))
    ]


def beyond_the_ledger(counted: Counted, row: ledger.Row) -> list[str]:
    """Return how a step's launches and streams differ from a row, with the lines of new ones."""
    before, now = row["figures"]["counts"], counts_of(counted.step)
    name, wrong = counted.case.name, []
    for what in ("launches", "host_launches"):
        if abs(now[what] - before[what]) > MARGIN:
            new = new_lines(counted, row)
            wrong.append(
                f"{name}: {now[what]:,} {what.replace('_', ' ')} a step, {before[what]:,} in the "
                f"ledger; {f'more at {_listed(new)}; ' if new else ''}if it is meant to be so, "
                f"{_record(name)}"
            )
    if now["streams"] != before["streams"]:
        wrong.append(
            f"{name}: work on the streams {now['streams']}, in the ledger {before['streams']}"
        )
    return wrong


def new_lines(counted: Counted, row: ledger.Row) -> Counter[str]:
    """Return FILE:LINE -> launches beyond those that the row has for the text of the line."""
    before: Mapping[str, Mapping[str, int]] = row["figures"].get("lines", {})
    found: Counter[str] = Counter()
    for file, of_file in launches_by_line(counted.step).items():
        left = Counter(before.get(file, {}))
        for line, number in of_file.items():
            known = min(number, left[text_of(line)])
            left[text_of(line)] -= known
            if number > known:
                found[line] = number - known
    return found


def off_the_plan(figures: Mapping[str, Any]) -> list[str]:
    """Return by how much plan's peak is off that of torch's allocator, where it is too much."""
    memory = figures["memory"]
    off = memory["predicted"] - memory["peak"]
    if abs(off) <= TOLERANCE * memory["peak"]:
        return []
    return [
        f"{figures['case']}: plan predicts a peak of {memory['predicted']:,} bytes, torch's "
        f"allocator has {memory['peak']:,}: {off / memory['peak']:+.0%}, allowed {TOLERANCE:.0%}"
    ]


def _listed(lines: Counter[str]) -> str:
    """Return the lines that have most, with their counts; those of the checkout relative to it."""
    shown = [f"{line.replace(f'{ROOT}/', '')} ({number})" for line, number in lines.most_common(12)]
    return ", ".join(shown) + (f" and {len(lines) - 12} more" if len(lines) > 12 else "")
