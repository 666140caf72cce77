"""All methods on the demo's data with one budget, and M3I with one thing changed at a time.

    m3i-fast bench methods                      every method, 90 s of training a run
    m3i-fast bench methods --num-steps 700      the same number of steps instead
    m3i-fast bench methods --ablations          M3I's ablations, and fewer labels and captions
    m3i-fast bench methods --growth             four methods with 30, 90, 270 and 810 s
    m3i-fast bench methods --table-only

One ledger row a run. What has a row is not run again, and a run that was stopped goes on from its
checkpoint with the number of steps it had. A time is made steps of by a calibration of each method
before anything is trained; a method that has a row for any time, seed or share takes the speed of
that. A row keeps every held-out item's hit, so that the table's differences carry paired bootstrap
intervals. Methods with a frozen encoder take that of the supervised run of the same seed, data and
budget, which is run first.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from dataclasses import asdict, fields, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from rich.progress import Progress

from m3i_fast.benchmarks import methods_plan
from m3i_fast.benchmarks.harness import parse
from m3i_fast.benchmarks.ledger import append_row, read_rows, results_dir
from m3i_fast.benchmarks.methods_ablation import NOTE, VARIANTS
from m3i_fast.benchmarks.methods_growth import draw_growth
from m3i_fast.benchmarks.methods_plan import (
    TEACHER,
    Config,
    Group,
    Pace,
    Run,
    recipe_digest,
    untrained,
)
from m3i_fast.benchmarks.methods_plot import draw
from m3i_fast.benchmarks.methods_run import is_trained, measure_untrained, train_and_measure
from m3i_fast.benchmarks.methods_table import OURS, UNTRAINED, Line, Rows, summarise, table
from m3i_fast.config import TrainConfig
from m3i_fast.engine.calibration import calibrate
from m3i_fast.objectives.methods import METHODS
from m3i_fast.pipelines.manifest import is_dataset
from m3i_fast.recipes import pack_demo
from m3i_fast.storage import write_atomically
from m3i_fast.terminal import make_console

SUBJECT = "methods"
CHECKPOINT_EVERY = 100  # steps; what a run that is killed loses at most
console = make_console(stderr=True)
logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Config, SUBJECT, argv)
    failures = {} if cfg.table_only else run_missing(cfg)
    found = {group: summarise(_rows(cfg, group)) for group in cfg.groups}
    for group, lines in found.items():
        text = table(
            lines, group.title, note=NOTE if cfg.ablations and group.labelled == 1.0 else ""
        )
        make_console().print(text, highlight=False, soft_wrap=True)
    _draw(cfg, found)
    if failures:
        raise RuntimeError("; ".join(f"{run.name}: {why}" for run, why in failures.items()))


def _draw(cfg: Config, found: dict[Group, list[Line]]) -> None:
    """The first group, or how all of them grow, as methods.svg or beside it."""
    first, lines = next(iter(found.items()))
    if cfg.growth and any(found.values()):
        budgets = {g.budget: lines for g, lines in found.items() if lines}
        stem, svg = "_growth", draw_growth(budgets)
    elif lines and not cfg.growth:
        stem, svg = "_ablations" * cfg.ablations, draw(lines, first.title)
    else:
        return
    path = (cfg.ledger or results_dir()) / f"{SUBJECT}{stem}.svg"
    write_atomically(path, svg.encode())
    logger.info("drawn to %s", path)


def run_missing(cfg: Config) -> dict[Run, str]:
    """Run what the ledger has no row for, `jobs` at a time; returns what failed, and why."""
    todo = _missing(cfg)
    for labelled in {1.0, *(run.labelled for run in todo)} if todo else ():
        if not is_dataset(_dataset(cfg, labelled)):
            pack_demo(_dataset(cfg, labelled), labelled=labelled, captioned=labelled)
    todo = _calibrated(cfg, todo)
    failures = {run: f"{TEACHER} did not end well" for run in todo if run.teacher in todo}
    with Progress(console=console) as bar:
        task = bar.add_task("runs", total=len(todo))
        for run, future in _in_order(cfg, todo):
            if (error := future.exception()) is None:
                failures.pop(run, None)
                _record(cfg, run, future.result())
            else:
                failures[run] = f"{type(error).__name__}: {error}"
            bar.advance(task)
    return failures


def _in_order(
    cfg: Config, todo: dict[Run, int | None]
) -> Iterator[tuple[Run, Future[dict[str, Any]]]]:
    """Each run as it ends, those with a teacher after it, and not at all where it failed."""
    order = TopologicalSorter({run: [run.teacher] if run.teacher in todo else [] for run in todo})
    order.prepare()
    ready: list[Run] = []
    running: dict[Future[dict[str, Any]], Run] = {}
    pool = ProcessPoolExecutor(cfg.jobs, multiprocessing.get_context("spawn"))
    try:
        while order.is_active():
            ready += order.get_ready()
            while ready and len(running) < cfg.jobs:  # so that Ctrl-C leaves none to be started
                run = ready.pop(0)
                running[_submit(cfg, pool, run, todo[run])] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                yield run, future
                if future.exception() is None:
                    order.done(run)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    cfg: Config, pool: ProcessPoolExecutor, run: Run, num_steps: int | None
) -> Future[dict[str, Any]]:
    if run.method == UNTRAINED:
        return pool.submit(measure_untrained, _train_config(cfg, run))
    return pool.submit(train_and_measure, *_job(cfg, run, num_steps))


def _missing(cfg: Config) -> dict[Run, int | None]:
    """What is to be run, each with its number of steps where that is known.

    A teacher that has a row but no weights here is run once more, with as many steps.
    """
    done = {run: row["figures"]["num_steps"] for run, row in _finished(cfg.ledger)}
    rates: dict[Pace, float] = {}
    for run, num_steps in done.items():
        if run.seconds is not None:
            rates.setdefault(run.pace, num_steps / run.seconds)
    todo: dict[Run, int | None] = {}
    for run in _planned(cfg):
        if run in done:
            continue
        teacher = run.teacher
        if teacher is not None and not is_trained(cfg.out / teacher.name):
            todo[teacher] = done.get(teacher) or _steps(teacher, rates)
        todo[run] = _steps(run, rates)
    return todo


def _steps(run: Run, rates: dict[Pace, float]) -> int | None:
    """rates: pace -> steps a second."""
    if run.seconds is None:
        return run.num_steps
    return max(round(rates[run.pace] * run.seconds), 1) if run.pace in rates else None


def _calibrated(cfg: Config, todo: dict[Run, int | None]) -> dict[Run, int | None]:
    """`todo` with the steps that a calibration of each pace gives.

    What waits for its teacher to be trained is calibrated then, and what fails here fails there.
    """
    unknown: dict[Pace, Run] = {}
    for run, num_steps in todo.items():
        if num_steps is None and run.teacher not in todo:
            unknown.setdefault(run.pace, run)
    if not unknown:
        return todo
    with (
        Progress(console=console) as bar,
        ProcessPoolExecutor(cfg.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        jobs = {
            run: pool.submit(calibrate, _job(cfg, run, None)[0], cfg.seconds)
            for run in unknown.values()
        }
        for _ in bar.track(as_completed(jobs.values()), len(jobs), description="calibrations"):
            pass
    rates = {
        run.pace: job.result() / cfg.seconds for run, job in jobs.items() if job.exception() is None
    }
    return {run: steps or _steps(run, rates) for run, steps in todo.items()}


def _planned(cfg: Config) -> Iterator[Run]:
    for seed in map(int, cfg.seeds.split(",")):
        if not cfg.chosen or OURS in cfg.chosen:
            yield untrained(seed)
        for group in cfg.groups:
            for name in group.methods:
                if not cfg.chosen or name in cfg.chosen:
                    yield Run(
                        method=name,
                        labelled=group.labelled,
                        seed=seed,
                        budget=group.budget,
                        recipe=recipe_digest(name),
                    )


def _train_config(cfg: Config, run: Run) -> TrainConfig:
    train = methods_plan.config_of(run.method, data=_dataset(cfg, run.labelled), seed=run.seed)
    return replace(train, num_threads=cfg.num_threads, checkpoint_every=CHECKPOINT_EVERY)


def _job(
    cfg: Config, run: Run, num_steps: int | None
) -> tuple[TrainConfig, Path, float | None, Path]:
    """The arguments of `train_and_measure`.

    Every run is measured by all labels and captions, whatever share it was trained with.
    """
    train, whole = _train_config(cfg, run), _dataset(cfg, 1.0)
    if run.teacher is not None:
        weights = str(cfg.out / run.teacher.name)
        train = replace(train, objective=replace(train.objective, teacher=weights))
    if num_steps is None:
        return train, cfg.out / run.name, run.seconds, whole
    return replace(train, num_steps=num_steps), cfg.out / run.name, None, whole


def _record(cfg: Config, run: Run, figures: dict[str, Any]) -> None:
    teacher = run.teacher.name if run.teacher else None
    append_row(SUBJECT, {**asdict(run), "teacher": teacher, **figures}, folder=cfg.ledger)
    console.print(f"{run.name}: {figures['num_steps']} steps", highlight=False)


def _finished(ledger: Path | None) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Rows of today's recipes, oldest first."""
    digests = {name: recipe_digest(name) for name in (*METHODS, *VARIANTS, UNTRAINED)}
    for row in read_rows(SUBJECT, folder=ledger):
        run = Run(**{field.name: row["figures"][field.name] for field in fields(Run)})
        if run.recipe == digests.get(run.method):
            yield run, row


def _rows(cfg: Config, group: Group) -> Rows:
    """All seeds' newest rows of a group, in the order of its methods; then those of UNTRAINED."""
    found: Rows = {name: {} for name in (*group.methods, UNTRAINED)}
    for run, row in _finished(cfg.ledger):
        of_group = (run.budget, run.labelled) == (group.budget, group.labelled)
        if run.method == UNTRAINED or (of_group and run.method in found):
            found[run.method][run.seed] = row
    return {name: dict(sorted(seeds.items())) for name, seeds in found.items() if seeds}


def _dataset(cfg: Config, labelled: float) -> Path:
    return cfg.data / ("openmoji" if labelled == 1.0 else f"openmoji-annotated-{labelled:g}")


if __name__ == "__main__":
    main()
