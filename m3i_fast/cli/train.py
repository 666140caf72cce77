"""m3i-fast train RECIPE [--field value]: pre-train, resume, reload a config."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Column, Table
from rich.text import Text

from m3i_fast.cli import console, show_usage
from m3i_fast.config import TrainConfig
from m3i_fast.config.fields import Checked, Conflict, unmet
from m3i_fast.config.run_encoder import expect_run
from m3i_fast.durable_files import expect_folder
from m3i_fast.engine.parallel.watchdog import INIT_MINUTES, WATCHDOG_MINUTES, Watchdog
from m3i_fast.flags import help_text, read_flags, typed_flags, whole_help
from m3i_fast.recipes import find_recipe, recipes
from m3i_fast.recipes.catalogue import RECIPES, typed_recipe, whole_batch

if TYPE_CHECKING:  # torch takes seconds: what is wrong is told, and help given, before
    from m3i_fast.engine.initial_weights import InitialWeights
    from m3i_fast.engine.run.directory import Resume
    from m3i_fast.engine.trainer import Outcome, Trainer

logger = logging.getLogger(__name__)

USAGE = """\
usage: m3i-fast train RECIPE [--out DIR] [--resume | --auto-resume] [--stop-on-collapse]
                             [--init SCHEME:PATH] [--field value ...]
       m3i-fast train --config FILE [...]
       m3i-fast train --resume RUN [--field value ...]
       m3i-fast launch --nproc-per-node N train RECIPE ...

m3i-fast recipes            lists the recipes
m3i-fast train RECIPE -h    tells the flags that are set most often; --help-all tells all of them
"""
_OF_A_STEP = {"--data.batch-size", "--data.max-tokens-per-batch", "--parallel.accumulate"}
# What people set, by what for; all else is under --help-all.
FLAGS = {
    "run": (
        *("out", "resume", "auto_resume", "max_hours"),
        *("config.init", "config.num_steps", "config.seed", "config.device"),
    ),
    "data": (
        *("config.data.path", "config.data.batch_size", "config.data.num_threads"),
        "config.num_classes",
    ),
    "optimiser": (
        *("config.optim.name", "config.optim.lr", "config.optim.warmup_fraction"),
        *("config.optim.weight_decay", "config.ema.momentum"),
    ),
    "precision and speed": ("config.precision", "config.compile", "config.cuda_graphs"),
    "several GPUs, and memory": (
        *("config.parallel.shard", "config.parallel.accumulate", "config.parallel.chunk"),
    ),
    "log, checkpoints and evaluation on the way": (
        *("config.log_every", "config.checkpoint_every", "config.evaluate_every"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Checked):
    """Pre-train a recipe, with these fields of its config changed."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    """Run directory: config.json, env.json, data.json, metrics.jsonl, tensorboard/ and
    checkpoints/."""
    resume: bool = False
    """Continue the run in --out from its newest checkpoint, at the next sample of its data; an
    error if there is none. `m3i-fast train --resume RUN` takes the run's config. The run may have
    another number of ranks, --data.batch-size and --parallel.accumulate, and the same data in
    another place. With another --num-steps it ends there. A line says what any of them changes."""
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

    def wrong_values(self) -> tuple[Conflict, ...]:
        """Yield nothing: limits of time may be infinite, and `conflicts` has the rest."""
        return ()

    def conflicts(self) -> Iterator[Conflict]:
        for name in ("max_hours", "init_minutes", "watchdog_minutes"):
            yield from unmet(self, **{name: (getattr(self, name) > 0, "> 0")})
        if self.resume and self.auto_resume:
            yield (
                "auto_resume",
                "expected without --resume, which is an error where there is no run",
            )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        return show_usage(USAGE, asked=bool(argv))
    command, rest = find_command(argv)
    if "--help-all" in rest:
        return show_usage(whole_help("train", typed_recipe(argv), command), asked=True)
    if {"-h", "--help"} & set(rest):
        return show_usage(short_help(typed_recipe(argv), command), asked=True)
    command = parse(argv)
    expect_folder(command.out, "--out")
    if command.resume:  # told before what the data and torch may say
        expect_run(command.out, "--resume")
    from m3i_fast.engine.run.data_fields import take_data_fields

    typed = typed_flags(rest)
    config = take_data_fields(command.config, typed)
    from m3i_fast.engine.parallel.ranks import leave_world

    outcome = run(
        config,
        command.out,
        recipe=argv[0] if argv[0] in recipes() else "",
        resume="auto" if command.auto_resume else command.resume,
        new_num_steps="--num-steps" in typed,
        new_batch_size=bool(_OF_A_STEP & typed),
        stop_on_collapse=command.stop_on_collapse,
        max_hours=command.max_hours,
        init_minutes=command.init_minutes,
        watchdog_minutes=command.watchdog_minutes,
    )
    leave_world()
    if outcome.signal is not None:
        how = "start it again" if command.auto_resume else "add --resume"
        console.print(
            f"stopped and saved at step {outcome.step}: {how} to continue {command.out}",
            soft_wrap=True,
        )
        return 128 + outcome.signal if outcome.signal == signal.SIGINT else os.EX_TEMPFAIL
    return 0


def find_command(argv: list[str]) -> tuple[TrainCommand, list[str]]:
    """Return the command of `RECIPE`, `--config FILE` or `--resume RUN`, and the other arguments.

    Raises as `find_recipe`.
    """
    if argv[0] == "--resume" and len(argv) > 1 and not argv[1].startswith("-"):
        run = Path(argv[1])
        expect_run(run, "--resume")
        config = TrainConfig.load(run / "config.json")
        return TrainCommand(config=config, out=run, resume=True), argv[2:]
    name, config, rest = find_recipe(argv)
    return TrainCommand(config=config, out=Path("runs") / name), rest


def parse(argv: list[str]) -> TrainCommand:
    """Return what the arguments ask for. Raises as `find_command` and `read_flags`."""
    default, rest = find_command(argv)
    return read_flags(
        TrainCommand, rest, prog=f"m3i-fast train {typed_recipe(argv)}", default=default
    )


def short_help(recipe: str, command: TrainCommand) -> str:
    """Return the flags that are set most often, with what the recipe sets them to."""
    return (
        f"usage: m3i-fast train {recipe} [--flag value ...]\n\n{help_text(command, FLAGS)}\n\n"
        f"All flags: m3i-fast train {recipe} --help-all"
    )


def print_initial_weights(initial: InitialWeights) -> None:
    """Print which weight of the encoder is from where, as the run's init.json has it."""
    weight = Column("weight", no_wrap=True)
    table = Table(weight, "from", "how", title=Text(initial.source), title_justify="left")
    for row in initial.rows():
        table.add_row(*map(Text, row))
    console.print(table)


def tell_whole_batch(recipe: str, cfg: TrainConfig, trainer: Trainer) -> None:
    """Log the pictures of a step and the epochs of a run, of views of one shape.

    A new run in another batch than the recipe's steps and learning rate are for is warned of.
    """
    from m3i_fast.pipelines.loader import Loader

    if not isinstance(trainer.loader, Loader):
        return
    size, accumulate = trainer.world.size, cfg.parallel.accumulate
    pictures = trainer.loader.num_rows
    a_step = size * accumulate * cfg.data.batch_size
    product = f"{size} {'rank' if size == 1 else 'ranks'} x {cfg.data.batch_size}"
    if accumulate > 1:
        product += f" x {accumulate}"
    logger.info(
        "a step takes %s pictures (%s); %s steps are %.3g epochs of %s pictures",
        f"{a_step:,}",
        product,
        f"{cfg.num_steps:,}",
        cfg.num_steps * a_step / pictures,
        f"{pictures:,}",
    )
    meant = whole_batch(RECIPES[recipe]) if recipe in RECIPES and trainer.step == 0 else None
    if meant is None or meant == a_step:
        return
    made = RECIPES[recipe]()
    advice: list[str] = []
    if cfg.num_steps == made.num_steps:
        advice.append(f"--num-steps {round(made.num_steps * meant / a_step)} for as many epochs")
    if cfg.optim.lr == made.optim.lr:
        linear, root = (made.optim.lr * (a_step / meant) ** power for power in (1, 0.5))
        advice.append(f"--optim.lr {linear:.3g} (linear in the batch) or {root:.3g} (in its root)")
    if advice:
        logger.warning(
            "recipe %s is for %s pictures a step, not %s: add %s",
            recipe,
            f"{meant:,}",
            f"{a_step:,}",
            ", and ".join(advice),
        )


def run(
    config: TrainConfig,
    out: Path,
    *,
    recipe: str = "",
    resume: Resume = False,
    new_num_steps: bool = False,
    new_batch_size: bool = False,
    stop_on_collapse: bool = False,
    max_hours: float = math.inf,
    init_minutes: float = INIT_MINUTES,
    watchdog_minutes: float = WATCHDOG_MINUTES,
) -> Outcome:
    """Train with a progress bar: steps, images a second, loss, time left, what is waited for."""
    from m3i_fast.engine.run.gpu_errors import explained_gpu_errors
    from m3i_fast.engine.trainer import Trainer
    from m3i_fast.observe.sinks.progress_bar import TrainingBar

    limit = 60 * init_minutes
    starting = Watchdog(None, seconds=limit, doing="the start", flag="--init-minutes")
    with explained_gpu_errors(config, out), starting:
        trainer = Trainer(
            config,
            out,
            resume=resume,
            new_num_steps=new_num_steps,
            new_batch_size=new_batch_size,
            stop_on_collapse=stop_on_collapse,
            recipe=recipe,
            join_seconds=limit,
            on_progress=starting.renew,
        )
    quiet = not trainer.world.is_main  # the ranks share a terminal
    if not quiet:
        tell_whole_batch(recipe, config, trainer)
    if trainer.initial is not None and not quiet:
        print_initial_weights(trainer.initial)
    bar = TrainingBar(
        console,
        num_steps=config.num_steps,
        step=lambda: trainer.step,
        doing=lambda: trainer.doing,
        is_shown=not quiet,
    )
    with bar:
        try:
            with explained_gpu_errors(config, out):
                return trainer.train(
                    bar.show, max_seconds=3600 * max_hours, watchdog_seconds=60 * watchdog_minutes
                )
        except (FileNotFoundError, FileExistsError) as error:  # no wrong request: it has begun
            raise RuntimeError(str(error)) from error
