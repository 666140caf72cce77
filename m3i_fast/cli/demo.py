"""m3i-fast demo: pack, pre-train for minutes, evaluate, and write the page.

What loads torch, or the packages that the drawings are rendered with, is imported where it runs.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from m3i_fast.cli import console
from m3i_fast.cli.evaluate import print_figures
from m3i_fast.cli.train import run as train
from m3i_fast.config.fields import STEPS, refuse, unmet, wrong_fields
from m3i_fast.durable_files import expect_folder
from m3i_fast.engine.run.lock import RunLock
from m3i_fast.recipes import demo, pack_demo
from m3i_fast.terminal import progress_bar


@dataclass(frozen=True, kw_only=True)
class DemoCommand:
    """Pack the demo's drawings, pre-train on them, evaluate, and write the run's page."""

    out: Path = Path("runs/demo")
    """Run directory; an older one is moved to <out>-<time>."""
    data: Path = Path("data/openmoji")
    """Dataset directory; packed when it is not there."""
    seconds: float = 330.0
    """Training time; a short calibration turns it into steps once."""
    num_steps: Annotated[int | None, STEPS] = None
    """Steps, instead of a time."""
    seed: int = 0
    """Seed of initialisation, masks, order and crops."""
    record: bool = False
    """Append the figures to the ledger, benchmarks/results/demo.jsonl."""


def main(argv: list[str]) -> int:
    return run(tyro.cli(DemoCommand, prog="m3i-fast demo", args=argv))


def run(command: DemoCommand) -> int:
    """Train the demo and write its page; return the exit code."""
    from m3i_fast.engine.run.data_fields import take_data_fields
    from m3i_fast.pipelines.dataset.manifest import is_dataset, read_manifest
    from m3i_fast.pipelines.sources.openmoji import expect_split_clusters
    from m3i_fast.planning.step_budget import calibrate

    refuse([*wrong_fields(command), *unmet(command, seconds=(command.seconds > 0, "> 0"))])
    expect_folder(command.out, "--out")
    if not is_dataset(command.data):
        console.rule("packing OpenMoji")
        pack_demo(command.data)
    else:
        found = read_manifest(command.data)
        console.print(
            f"found {found.name} in {command.data}: {found.split('train').num_samples:,} pictures "
            f"to train on, a vocabulary of {found.tokenizer.vocab_size:,}",
            soft_wrap=True,
        )
    expect_split_clusters(command.data)
    cfg = take_data_fields(demo(data=command.data, seed=command.seed))
    num_steps = command.num_steps
    if num_steps is None:
        console.rule(f"measuring how many steps take {command.seconds:g} s")
        with progress_bar("steps", None, console=console) as update:
            num_steps = calibrate(
                cfg, command.seconds, lambda done, total: update(completed=done, total=total)
            )
        console.print(f"--num-steps {num_steps} repeats this run")
    cfg = replace(cfg, num_steps=num_steps)
    set_aside(command.out)
    console.rule(f"training {num_steps} steps")
    outcome = train(cfg, command.out)
    if outcome.signal is not None:
        console.print(f"stopped at step {outcome.step}: no page is written")
        return 128 + outcome.signal
    console.rule("evaluating on held-out concepts")
    figures, page = report(command.out)
    if command.record:
        from m3i_fast.benchmarks.ledger.rows import append_row

        settings = {"seed": command.seed, "num_steps": num_steps, "seconds": command.seconds}
        append_row("demo", {**settings, **figures})
    console.print(f"open {page}", soft_wrap=True)
    return 0


def set_aside(out: Path) -> None:
    """Move an older run out of the way; nothing is deleted, and none that is going on is moved."""
    if out.exists():
        moved = out.with_name(f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        lock = RunLock(out)
        lock.acquire()
        os.rename(out, moved)
        lock.release()
        console.print(f"moved the older {out} to {moved}", soft_wrap=True)


def report(run: Path) -> tuple[dict[str, Any], Path]:
    """Evaluate a run, write its evaluation.json and report.html; return figures and page."""
    from m3i_fast.cli.report import ReportCommand, write
    from m3i_fast.engine.evaluator import evaluate

    figures = evaluate(run).figures
    print_figures(figures)
    page = run / "report.html"
    write(ReportCommand(run=run), page, beside_untrained=True)
    return figures, page
