"""The summary of a run of `make gpu`: failures, machine, steps and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from scripts.gpu.steps import Result, Step

SHOWN_LINES = 60  # the last lines of a benchmark's output, with its table


def write_summary(
    out: Path, *, header: str, steps: Sequence[Step], results: Sequence[Result]
) -> None:
    """Write summary.md into `out`, from env.json and the steps' files there."""
    failed = [result for result in results if result.has_failed]
    text = [
        "# make gpu",
        header,
        f"**{len(failed)} of {len(results)} steps failed:** "
        f"{', '.join(result.name for result in failed)}"
        if failed
        else "All steps that could run passed.",
        *_machine(out),
        "## Steps",
        "\n".join(["| step | outcome | seconds |", "| --- | --- | ---: |", *map(_row, results)]),
        *_predicted(out),
        *_benchmarks(out, steps, results),
    ]
    (out / "summary.md").write_text("\n\n".join(text) + "\n")


def _machine(out: Path) -> list[str]:
    path = out / "env.json"
    if not path.is_file():
        return []
    facts = json.loads(path.read_text())
    inventory = facts.pop("inventory")
    rows = [f"| {name} | {value} |" for name, value in {**facts, **inventory}.items()]
    return ["## Machine", "\n".join(["| what | found |", "| --- | --- |", *rows])]


def _row(result: Result) -> str:
    outcome = f"**{result.outcome}**" if result.has_failed else result.outcome
    return f"| {result.name} | {outcome} | {result.seconds:.0f} |"


def _predicted(out: Path) -> list[str]:
    """Return the page of predicted beside measured, as a section; nothing where it is missing."""
    path = out / "predicted.md"
    return [f"#{path.read_text().rstrip()}"] if path.is_file() else []


def _benchmarks(out: Path, steps: Sequence[Step], results: Sequence[Result]) -> list[str]:
    measured = {step.name for step in steps if step.is_benchmark}
    text = []
    for result in results:
        if result.name in measured and result.command:
            kept = (out / f"{result.name}.txt").read_text().splitlines()[-SHOWN_LINES:]
            text += [f"## {result.name}", "\n".join(["```", f"$ {result.command}", *kept, "```"])]
    return text
