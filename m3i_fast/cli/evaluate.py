"""m3i-fast evaluate RUN: measure a run's encoder on held-out pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from m3i_fast.cli import console
from m3i_fast.config_fields import BATCHES, check_fields
from m3i_fast.engine.evaluator import evaluate


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand:
    run: tyro.conf.Positional[Path]
    """Run directory that `m3i-fast train` wrote."""
    split: str = "heldout"
    """Split to measure on; no setting is chosen on it."""
    batch_size: Annotated[int, BATCHES] = 256
    """Pictures a forward pass."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> int:
    command = tyro.cli(EvaluateCommand, prog="m3i-fast evaluate", args=argv)
    found = evaluate(command.run, split=command.split, batch_size=command.batch_size)
    console.print_json(json.dumps(found.figures))
    return 0
