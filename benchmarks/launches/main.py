"""m3i-fast bench launches: what a step of each recipe asks of a GPU, counted without one."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.progress import Progress
from rich.table import Table

from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.launches.matrix import GATED, MATRIX, Case
from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.terminal import make_console

console = make_console(stderr=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Count what steady steps ask of a GPU on the null CUDA runtime, and hold plan's peak to it."""

    only: str = ""
    """Regular expression: only cases whose whole name matches, as "demo, .*"; all unless given."""
    record: bool = True
    """Append the rows to the ledger, benchmarks/results/launches.jsonl."""

    def cases(self) -> list[Case]:
        """Return the cases that are asked for. Raises ValueError where there is none."""
        wanted = [c for c in MATRIX if not self.only or re.fullmatch(self.only, c.name)]
        if not wanted:
            names = ", ".join(case.name for case in MATRIX)
            raise ValueError(f"--only: expected to match one of {names}; got {self.only!r}")
        return wanted


def main(argv: list[str] | None = None) -> int:
    """Count the cases and show them; 0 where all are green, else 1."""
    cfg = read_command(Config, "launches", argv)
    # Models, which --help does without
    from m3i_fast.benchmarks.launches.gate import SUBJECT

    logging.getLogger(append_row.__module__).setLevel(logging.WARNING)  # a line a row
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as bar:
        for case in bar.track(cfg.cases(), description="cases"):
            figures, complaints = judge(case, Path(folder))
            wrong += complaints
            if figures:
                rows.append(figures)
                if cfg.record:
                    append_row(SUBJECT, figures)
    make_console().print(_table(rows))
    for complaint in wrong:
        console.print(complaint, style="red", highlight=False)
    return 1 if wrong else 0


def judge(case: Case, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Count a case: its figures, none where it failed, and what is wrong with it."""
    from m3i_fast.benchmarks.launches.counting import config_of, count, figures_of, plan_of
    from m3i_fast.benchmarks.launches.gate import never_in_a_step, off_the_plan

    try:
        counted = count(case, folder)
        cfg = config_of(case, folder)
        figures = figures_of(counted, cfg, plan_of(case, cfg), with_lines=case.name in GATED)
    except (RuntimeError, ValueError) as error:
        return {}, [f"{case.name}: {error}"]
    return figures, [*never_in_a_step(counted), *off_the_plan(figures)]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case")
    heads = ("launches", "of the host", "ours", "waits", "pageable", "allocations", "peak, MiB")
    for head in (*heads, "plan", "us a launch"):
        table.add_column(head, justify="right")
    for figures in rows:
        counts, memory = figures["counts"], figures["memory"]
        names = ("launches", "host_launches", "own_launches", "waits", "pageable_copies")
        cells = [f"{counts[name]:,}" for name in (*names, "allocations")]
        off = memory["predicted"] / memory["peak"] - 1
        cells += [f"{memory['peak'] / 2**20:,.0f}", f"{off:+.1%}"]
        table.add_row(figures["case"], *cells, f"{figures['host']['us_a_launch']:.1f}")
    return table
