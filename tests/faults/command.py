"""Run a campaign, show it, and keep it where that is asked for."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.progress import Progress
from rich.table import Table

from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.storage import write_atomically
from m3i_fast.terminal import make_console
from tests.faults.campaign import Campaign, Trial, Verdict
from tests.faults.report import DOCS, SUBJECT, newest, page, picture
from tests.faults.trials import plan

if TYPE_CHECKING:
    from m3i_fast.cli.faults import FaultsCommand

console = make_console(stderr=True)


def run(command: FaultsCommand) -> int:
    """Exit code: 1 where a run did not recover with equal weights."""
    memory = Path("/dev/shm")  # syncs cost nothing there, and kills strike no less
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        with console.status("runs without a fault"):
            campaign = Campaign(Path(folder))
        trials = plan(campaign, kills=command.kills, writes=command.writes, seed=command.seed)
        wanted = [trial for trial in trials if re.search(command.only, trial.fault)]
        if not wanted:
            raise ValueError(f"--only: expected to match a fault, got {command.only!r}")
        found = carry_out(campaign, wanted, command.jobs)
    if command.record:
        record(found, seed=command.seed)
    make_console().print(_table(found))
    for verdict in found:
        if verdict.log:
            console.print(f"{verdict.fault}, {verdict.where}:\n{verdict.log}")
    return 0 if all(verdict.weights_equal for verdict in found) else 1


def carry_out(campaign: Campaign, trials: Sequence[Trial], jobs: int) -> list[Verdict]:
    """In the order of the trials, `jobs` at a time."""
    with Progress(console=console) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(campaign.judge, trial) for trial in trials]
        for _ in bar.track(as_completed(futures), len(futures), description="faults"):
            pass
    return [future.result() for future in futures]


def record(found: Sequence[Verdict], *, seed: int) -> None:
    campaign = datetime.now(timezone.utc).isoformat(timespec="seconds")
    logging.getLogger(append_row.__module__).setLevel(logging.WARNING)  # a line a row
    for number, verdict in enumerate(found):
        figures = {"campaign": campaign, "trial": number, "seed": seed, **asdict(verdict)}
        append_row(SUBJECT, {name: value for name, value in figures.items() if name != "log"})
    rows = newest()
    write_atomically(DOCS / "faults.md", page(rows).encode())
    write_atomically(DOCS / "faults.svg", picture(rows).encode())


def _table(found: Sequence[Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("fault", "trials", "recovered", "weights equal"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for fault in dict.fromkeys(verdict.fault for verdict in found):
        of_fault = [verdict for verdict in found if verdict.fault == fault]
        recovered = sum(verdict.recovered for verdict in of_fault)
        equal = sum(verdict.weights_equal for verdict in of_fault)
        table.add_row(fault, *map(str, (len(of_fault), recovered, equal)))
    return table
