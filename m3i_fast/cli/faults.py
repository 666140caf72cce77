"""m3i-fast faults: spoil runs in every way and see that each ends as if nothing had happened."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class FaultsCommand:
    kills: int = 100
    """Runs killed at a random moment."""
    writes: int | None = None
    """Of the writes while one checkpoint is there so many are struck; all unless given."""
    only: str = ""
    """Regular expression: only faults with such a name, as "NaN|SIGTERM"."""
    seed: int = 0
    """Of the random moments."""
    jobs: int = os.cpu_count() or 1
    """Trials at a time; each has one or two processes of one thread."""
    record: bool = False
    """Append a row a trial to the ledger and write docs/faults.md and its picture."""


def main(argv: list[str]) -> int:
    """0 where all runs recovered with equal weights, else 1."""
    command = tyro.cli(FaultsCommand, prog="m3i-fast faults", args=argv)
    for name in ("kills", "writes", "jobs"):
        value, least = getattr(command, name), int(name == "jobs")
        if value is not None and value < least:
            raise ValueError(f"--{name}: expected >= {least}, got {value}")
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "tests" / "faults").is_dir():
        raise ValueError(
            f"m3i-fast faults: expected a checkout with tests/, which no wheel has, got {checkout}"
        )
    sys.path.insert(0, str(checkout))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return importlib.import_module("tests.faults.command").run(command)
