"""The tables of docs/measure/launches.md: what steps ask of a GPU, by rows of `bench launches`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from m3i_fast.benchmarks.ledger import rows as ledger
from m3i_fast.benchmarks.ledger.rows import Row

SUBJECT = "launches"
ABSENT = "not measured yet (`m3i-fast bench launches`)"
TOLERANCE = 0.10  # of the predicted peak
NEVER = ("waits", "pageable_copies", "allocations", "faults")
BACKWARD = "backward of "
MIB = 2**20


def rows() -> list[Row]:
    """Return the newest row of each case, in the order in which cases were first counted."""
    return list({row["figures"]["case"]: row for row in ledger.read_rows(SUBJECT)}.values())


def is_green(figures: Mapping[str, Any]) -> bool:
    """Return whether a case does nothing that no steady step may, and plan's peak is right."""
    counts, memory = figures["counts"], figures["memory"]
    off = abs(memory["predicted"] / memory["peak"] - 1)
    return off <= TOLERANCE and not any(counts[name] for name in NEVER)


def recipes_table(markdown: Any) -> str:
    """Return the table of the recipes; `markdown` makes one of a head and lines."""
    found = [row for row in rows() if _is_own(row["figures"])]
    return _table(found, "recipe", markdown)


def settings_table(markdown: Any) -> str:
    """Return the table of the demo's settings."""
    found = [row for row in rows() if row["figures"]["case"].startswith("demo, ")]
    return _table(found, "setting of the demo", markdown)


def _is_own(figures: Mapping[str, Any]) -> bool:
    return figures["case"] == figures["recipe"]


def _table(found: Sequence[Row], heading: str, markdown: Any) -> str:
    if not found:
        return f"Launches: {ABSENT}."
    head = [heading, "launches", "by the host", "ours", "pinned copies", "on the card, MiB"]
    head += ["peak, MiB", "plan", "us a launch", "green"]
    lines = [_line(row["figures"]) for row in found]
    commits = ", ".join(dict.fromkeys(map(ledger.commit_of, found)))
    days = ", ".join(dict.fromkeys(row["time"][:10] for row in found))
    torch = ", ".join(dict.fromkeys(row["versions"]["torch"] for row in found))
    return (
        f"{markdown(head, lines)}\n\n{sum(is_green(row['figures']) for row in found)} of "
        f"{len(found)} green. Counted on the null CUDA runtime, by no GPU: torch {torch}; "
        f"`m3i-fast bench launches`; {days}, commit {commits}."
    )


def _line(figures: Mapping[str, Any]) -> list[str]:
    counts, memory, host = figures["counts"], figures["memory"], figures["host"]
    name = figures["case"].removeprefix("demo, ")
    pinned = "pinned to device"
    return [
        f"`{name}`" if _is_own(figures) else name,
        f"{counts['launches']:,}",
        f"{counts['host_launches']:,}",
        f"{counts['own_launches']:,}",
        f"{counts['copies'].get(pinned, 0)} ({counts['copied_bytes'].get(pinned, 0):,} B)",
        f"{counts['copied_bytes'].get('device to device', 0) / MIB:,.1f}",
        f"{memory['peak'] / MIB:,.1f}",
        f"{memory['predicted'] / memory['peak'] - 1:+.1%}",
        f"{host['us_a_launch']:,.2f}" + (" (host)" if host["bound"] else ""),
        "yes" if is_green(figures) else "no",
    ]


def modules_table(markdown: Any) -> str:
    """Return how the launches of the demo divide among our modules, those with most first."""
    row = ledger.newest(ledger.read_rows(SUBJECT), case="demo")
    if row is None:
        return f"Launches by module: {ABSENT}."
    total, forward, backward = row["figures"]["counts"]["launches"], Counter[str](), Counter[str]()
    for file, texts in row["figures"]["lines"].items():
        for text, number in texts.items():
            name = f"`{file}`" if file != "?" else "without a line"
            (backward if text.startswith(BACKWARD) else forward)[name] += number
    both = forward + backward
    lines = [
        [name, f"{forward[name]:,}", f"{backward[name]:,}", f"{number / total:.0%}"]
        for name, number in both.most_common()
    ]
    head = ["module", "launches", "of its backward pass", "share"]
    return f"{markdown(head, lines)}\n\nOf {total:,} launches of a step of `demo`."
