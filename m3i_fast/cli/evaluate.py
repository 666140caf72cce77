"""m3i-fast evaluate RUN: measure a run's encoder on held-out pictures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.table import Table

from m3i_fast.cli import console
from m3i_fast.config.fields import BATCHES, check_fields
from m3i_fast.report.verdict import SOURCES, Judgement, judge, judge_more
from m3i_fast.terminal import make_console


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    """Measure a run's encoder on held-out pictures, beside an untrained one and chance."""

    run: tyro.conf.Positional[Path]
    """Run directory that `m3i-fast train` wrote."""
    split: str = "heldout"
    """Split to measure on; no setting is chosen on it."""
    data: Path | None = None
    """Data set to measure on, with the run's tokenizer; none: the run's own. A run on a mixture of
    data sets needs it."""
    batch_size: Annotated[int, BATCHES] = 256
    """Pictures a forward pass."""
    json: bool = False
    """Print evaluation.json, with every interval, in place of the table."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> int:
    command = tyro.cli(EvaluateCommand, prog="m3i-fast evaluate", args=argv)
    from m3i_fast.engine.evaluator import evaluate  # loads torch, which help does without

    evaluation = evaluate(
        command.run, split=command.split, batch_size=command.batch_size, data=command.data
    )
    if command.json:
        sys.stdout.write(json.dumps(evaluation.figures, indent=2) + "\n")
    else:
        print_figures(evaluation.figures)
        console.print(f"wrote {command.run / 'evaluation.json'}", soft_wrap=True)
    return 0


def print_figures(figures: Mapping[str, Any]) -> None:
    """Print the figures of evaluation.json on standard output, those of the hard half last."""
    output = make_console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{figures['held_out_concepts']} held-out concepts", overflow="fold")
    for name in SOURCES.values():
        table.add_column(name, justify="right", no_wrap=True)
    rows = judge(figures) + judge_more(figures)
    for row in sorted(rows, key=lambda row: row.name.endswith("_hard")):
        table.add_row(row.title, *(_cell(row, source) for source in SOURCES))
    output.print(table)
    output.print(
        "* not told from the trained encoder: by the 95 % interval of the difference, paired, over "
        "concepts with near-duplicates as one, and by Holm's correction for all comparisons. "
        "Hard half: the concepts that lie farthest from any training picture.",
        highlight=False,
    )


def _cell(row: Judgement, source: str) -> str:
    """Return a value, marked where the trained encoder's is neither above nor below it."""
    alike = any(
        comparison.source == source and comparison.verdict == "no difference found"
        for comparison in row.comparisons
    )
    return row.shown.get(source, "-") + (" *" if alike else "  ")
