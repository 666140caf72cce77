"""m3i-fast train RECIPE [--field value]: pre-train, resume, reload a config."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from m3i_fast.cli import console
from m3i_fast.config import TrainConfig
from m3i_fast.engine.parallel.ranks import leave_world
from m3i_fast.engine.parallel.rendezvous import INIT_MINUTES
from m3i_fast.engine.parallel.watchdog import WATCHDOG_MINUTES, Watchdog
from m3i_fast.engine.run.directory import Resume
from m3i_fast.engine.trainer import Outcome, Trainer
from m3i_fast.recipes import find_recipe, recipes

USAGE = """\
usage: m3i-fast launch --nproc-per-node N -m m3i_fast.cli train RECIPE ...
       m3i-fast train RECIPE [--out DIR] [--resume | --auto-resume] [--stop-on-collapse]
                             [--field value ...]
       m3i-fast train --config FILE [...]
"""


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    """Run directory: config.json, env.json, metrics.jsonl, tensorboard/, checkpoints/."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint; an error if there is none."""
    auto_resume: bool = False
    """Continue the run in --out if there is one, else begin it: for jobs that are started again."""
    stop_on_collapse: bool = False
    """End with an error, after a checkpoint, when a monitor stays out of its healthy range."""
    max_hours: float = math.inf
    """Save and exit with 75 after so long, as at SIGTERM and SIGUSR1: before a job's time is up."""
    init_minutes: float = INIT_MINUTES
    """With ranks missing for so long at the start name them and exit with 76; the same, with the
    stacks of all threads, where they have met and the start (model, data, a resume's checkpoint)
    takes 5 times as long; inf: never."""
    watchdog_minutes: float = WATCHDOG_MINUTES
    """With no step done for so long (a first step, a save: 5 times as long; where steps are slow, 5
    of the fastest) write the stacks of all threads to stacks-rankN.txt in --out and exit with 76;
    inf: never."""

    def __post_init__(self) -> None:
        for name in ("max_hours", "init_minutes", "watchdog_minutes"):
            if not getattr(self, name) > 0:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: expected > 0, got {getattr(self, name)}")
        if self.resume and self.auto_resume:
            raise ValueError(
                "--auto-resume: expected without --resume, which is an error where there is no run"
            )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        console.print(f"{USAGE}\nrecipes: {', '.join(recipes())}", highlight=False)
        return 0 if argv else 2
    command = parse(argv)
    try:
        outcome = run(
            command.config,
            command.out,
            recipe=find_recipe(argv)[0],
            resume="auto" if command.auto_resume else command.resume,
            stop_on_collapse=command.stop_on_collapse,
            max_hours=command.max_hours,
            init_minutes=command.init_minutes,
            watchdog_minutes=command.watchdog_minutes,
        )
    finally:
        leave_world()
    if outcome.signal is not None:
        how = "start it again" if command.auto_resume else "add --resume"
        console.print(
            f"stopped and saved at step {outcome.step}: {how} to continue {command.out}",
            soft_wrap=True,
        )
        return 128 + outcome.signal if outcome.signal == signal.SIGINT else os.EX_TEMPFAIL
    return 0


def parse(argv: list[str]) -> TrainCommand:
    """What the arguments ask for. Raises as `find_recipe`; SystemExit for an unknown flag."""
    name, config, rest = find_recipe(argv)
    return tyro.cli(
        TrainCommand,
        prog=f"m3i-fast train {argv[0]}",
        default=TrainCommand(config=config, out=Path("runs") / name),
        args=rest,
        config=(tyro.conf.CascadeSubcommandArgs,),  # --field may stand after data.local-views:...
    )


def run(
    config: TrainConfig,
    out: Path,
    *,
    recipe: str = "",
    resume: Resume = False,
    stop_on_collapse: bool = False,
    max_hours: float = math.inf,
    init_minutes: float = INIT_MINUTES,
    watchdog_minutes: float = WATCHDOG_MINUTES,
) -> Outcome:
    """Train with a progress bar: steps, images a second, time left, loss."""
    limit = 60 * init_minutes
    with Watchdog(None, seconds=limit, doing="the start", flag="--init-minutes"):
        trainer = Trainer(
            config,
            out,
            resume=resume,
            stop_on_collapse=stop_on_collapse,
            recipe=recipe,
            join_seconds=limit,
        )
    quiet = not trainer.world.is_main  # the ranks share a terminal
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task("training", total=config.num_steps, completed=trainer.step, figures="")

        def show(step: int, values: dict[str, float]) -> None:
            loss = values.get("loss/total", math.nan)  # none where all steps were skipped
            figures = f"{values['throughput/img_s']:.0f} img/s  loss {loss:.3f}"
            bar.update(task, completed=step, figures=figures)

        try:
            return trainer.train(
                show, max_seconds=3600 * max_hours, watchdog_seconds=60 * watchdog_minutes
            )
        except (FileNotFoundError, FileExistsError) as error:  # no wrong request: it has begun
            raise RuntimeError(str(error)) from error
