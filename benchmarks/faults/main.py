"""m3i-fast faults: break runs in every way, and check that each recovers with equal weights."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.progress import Progress
from rich.table import Table

from m3i_fast.durable_files import write_atomically
from m3i_fast.flags import read_flags
from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # torch takes seconds, and --help does without
    from m3i_fast.benchmarks.faults.campaign import Campaign, Trial, Verdict

console = make_console(stderr=True)


@dataclass(frozen=True, kw_only=True)
class Config:
    kills: int = 100
    """Runs killed at a random moment."""
    writes: int | None = None
    """Writes struck while one checkpoint is there; all of them unless given."""
    only: str = ""
    """Regular expression: only faults with such a name, as "NaN|SIGTERM"."""
    seed: int = 0
    """Of the random moments."""
    jobs: int = os.cpu_count() or 1
    """Trials at a time; each has one or two processes of one thread."""
    record: bool = False
    """Append a row a trial to the ledger and write docs/measure/faults.md and its picture."""

    def __post_init__(self) -> None:
        for name in ("kills", "writes", "jobs"):
            value, least = getattr(self, name), int(name == "jobs")
            if value is not None and value < least:
                raise ValueError(f"--{name}: expected >= {least}, got {value}")
        if not self.record:
            return
        from m3i_fast.benchmarks.faults.report import DOCS

        if not DOCS.is_dir():
            raise ValueError(f"--record: expected a checkout with {DOCS.name}/, got none at {DOCS}")


def main(argv: list[str]) -> int:
    """Run a campaign and show it; 0 where all runs recovered with equal weights, else 1."""
    return run(read_flags(Config, argv, prog="m3i-fast faults", default=Config()))


def run(cfg: Config) -> int:
    """Carry out a campaign and show it; return 1 where a run did not recover with equal weights."""
    from m3i_fast.benchmarks.faults.campaign import Campaign
    from m3i_fast.benchmarks.faults.fault_catalogue import plan

    memory = Path("/dev/shm")  # syncs cost nothing there, and kills strike no less
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        with console.status("runs without a fault"):
            campaign = Campaign(Path(folder))
        trials = plan(campaign, kills=cfg.kills, writes=cfg.writes, seed=cfg.seed)
        wanted = [trial for trial in trials if re.search(cfg.only, trial.fault)]
        if not wanted:
            raise ValueError(f"--only: expected to match a fault, got {cfg.only!r}")
        verdicts = carry_out(campaign, wanted, cfg.jobs)
    if cfg.record:
        record(verdicts, seed=cfg.seed)
    make_console().print(_table(verdicts))
    for verdict in verdicts:
        if verdict.log:
            console.print(f"{verdict.fault}, {verdict.where}:\n{verdict.log}")
    return 0 if all(verdict.weights_equal for verdict in verdicts) else 1


def carry_out(campaign: Campaign, trials: Sequence[Trial], jobs: int) -> list[Verdict]:
    """Run the trials, `jobs` at a time, and return their verdicts in the order of the trials."""
    with Progress(console=console) as bar, ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(campaign.judge, trial) for trial in trials]
        for _ in bar.track(as_completed(futures), len(futures), description="faults"):
            pass
    return [future.result() for future in futures]


def record(verdicts: Sequence[Verdict], *, seed: int) -> None:
    from m3i_fast.benchmarks.faults.report import PAGE, PICTURE, SUBJECT, newest, page, picture
    from m3i_fast.benchmarks.ledger.rows import append_row

    campaign = datetime.now(timezone.utc).isoformat(timespec="seconds")
    logging.getLogger(append_row.__module__).setLevel(logging.WARNING)  # a line a row
    for number, verdict in enumerate(verdicts):
        figures = {"campaign": campaign, "trial": number, "seed": seed, **asdict(verdict)}
        append_row(SUBJECT, {name: value for name, value in figures.items() if name != "log"})
    rows = newest()
    write_atomically(PAGE, page(rows).encode())
    write_atomically(PICTURE, picture(rows).encode())


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("fault", "trials", "recovered", "weights equal"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for fault in dict.fromkeys(verdict.fault for verdict in verdicts):
        of_fault = [verdict for verdict in verdicts if verdict.fault == fault]
        recovered = sum(verdict.recovered for verdict in of_fault)
        equal = sum(verdict.weights_equal for verdict in of_fault)
        table.add_row(fault, *map(str, (len(of_fault), recovered, equal)))
    return table
