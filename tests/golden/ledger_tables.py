"""The part of the tables that the ledger makes, for README, docs and the benchmarks' commands."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from m3i_fast.benchmarks.ledger import readme_tables
from m3i_fast.benchmarks.ledger.rows import results_dir
from m3i_fast.benchmarks.methods import main as methods
from m3i_fast.benchmarks.one_stage import main as one_stage
from m3i_fast.benchmarks.one_stage.plan import read_plan
from m3i_fast.benchmarks.one_stage.tables import (
    comparisons,
    secondary_table,
    tuning_table,
)
from m3i_fast.benchmarks.one_stage.verdict import page_table
from m3i_fast.terminal import make_console

# Those commands of docs/measure/results.md of which rows count today.
OF_METHODS = (
    "--annotations --num-steps 300 --seeds 0,1,2 --brief",
    '--annotations --shares 1 --seconds 330 --methods "m3i,m3i as before" --seeds 0,1,2 --brief',
    "--targets --dataset styles --seconds 120 --seeds 0,1,2,3,4 --brief",
    "--pilot --dataset styles --seeds 0,1,2 --brief",
)
PLANS = ("first", "second", "third")


def tables() -> dict[str, list[str]]:
    """Return the lines of every table."""
    found = {name: table().splitlines() for name, table in readme_tables.TABLES.items()}
    with TemporaryDirectory() as folder:  # each command draws a picture beside its rows
        for name in ("methods.jsonl", "one_stage.jsonl"):
            (Path(folder) / name).symlink_to(results_dir() / name)
        for flags in OF_METHODS:
            argv = [*shlex.split(flags), "--table-only", "--ledger", folder]
            found[f"bench methods {flags}"] = _printed(methods.main, argv)
        for name in PLANS:
            argv = ["--plan", name, "--table-only", "--ledger", folder]
            found[f"bench one-stage --plan {name}"] = _printed(one_stage.main, argv)
    for name in PLANS:
        plan = read_plan(name)
        rows = one_stage.finished(plan, None)
        found[f"one_stage, {name} plan, tuning"] = _printed(
            make_console().print, tuning_table(plan, rows)
        )
        if compared := comparisons(plan, rows):  # of one seed there are none
            found[f"one_stage, {name} plan, docs"] = page_table(compared).splitlines()
        found[f"one_stage, {name} plan, secondary"] = secondary_table(plan, rows).splitlines()
    return found


def _printed(command: Callable[..., object], *given: object) -> list[str]:
    """Return the lines that a command prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        command(*given)
    return [line.rstrip() for line in text.getvalue().splitlines()]
