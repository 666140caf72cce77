"""One stage of M3I against the same time on single targets and on two stages, by a fixed plan.

    m3i-fast bench one-stage --pack --iconify NOTO FLUENT EMOJIONE --countries FILE
    m3i-fast bench one-stage --calibrate    time a step of each method, once for all, quietly
    m3i-fast bench one-stage --tune         try each arm's settings on the tuning split
    m3i-fast bench one-stage                run what counts, or go on with it
    m3i-fast bench one-stage --table-only   table, verdict and drawing of the rows that are there

A plan, benchmarks/one_stage/plans/NAME.json, says what is compared and by which rule; it is
committed before the first run that counts, and no flag changes it. --arms, --sets and --seeds only
choose what is run now. One process a core; what has a row is not run again, and a run that was
stopped goes on from its checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from m3i_fast.benchmarks.core.child_processes import child_processes
from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.ledger.rows import append_row, read_rows, results_dir
from m3i_fast.benchmarks.one_stage import datasets
from m3i_fast.benchmarks.one_stage.arms import ARMS, Stage, Tuning, stage_config
from m3i_fast.benchmarks.one_stage.plan import NUM_CLASSES, Plan, Run, SetName, read_plan
from m3i_fast.benchmarks.one_stage.plot import draw
from m3i_fast.benchmarks.one_stage.tables import (
    Rows,
    chosen,
    comparisons,
    counted_table,
    is_complete,
    stage_terms,
    tuning_table,
)
from m3i_fast.benchmarks.one_stage.term_plot import draw_terms
from m3i_fast.benchmarks.one_stage.train import Job, run_job
from m3i_fast.benchmarks.one_stage.verdict import comparison_table, judge, sentences
from m3i_fast.durable_files import write_atomically
from m3i_fast.planning.step_budget import step_seconds
from m3i_fast.terminal import make_console

SUBJECT = "one_stage"
ROUNDS = 3  # of all methods in turn, so that a busy neighbour meets all alike
console = make_console(stderr=True)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    plan: str = "third"
    """Name of a file of benchmarks/one_stage/plans."""
    pack: bool = False
    """Write the plan's data sets, with --iconify and --countries, and run nothing."""
    calibrate: bool = False
    """Time a step of each method, write the plan's file of step times, and run nothing else."""
    tune: bool = False
    """Run what settings are chosen by, and print what to write into the plan."""
    table_only: bool = False
    """Print and draw what the ledger's rows say, and run nothing."""
    arms: tuple[str, ...] = ()
    """Run these arms of the plan now; all unless given."""
    sets: tuple[SetName, ...] = ()
    """Run on these data sets of the plan now; all unless given."""
    seeds: tuple[int, ...] = ()
    """Run these seeds of the plan now; all unless given."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, of one thread each."""
    iconify: tuple[Path, ...] = ()
    """With --pack: icons.json of npm's @iconify-json/noto, fluent-emoji-flat and emojione."""
    countries: Path | None = None
    """With --pack: countries-50m.json of npm's world-atlas."""
    data: Path = Path("data/one-stage")
    """Folder of the plan's data sets."""
    out: Path = Path("runs/one-stage")
    """Where the run directories go."""
    ledger: Path | None = None
    """Folder of the ledger and the picture; None: benchmarks/results of the checkout."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs: expected at least 1, got {self.jobs}")
        asked = [n for n in ("pack", "calibrate", "tune", "table_only") if getattr(self, n)]
        if len(asked) > 1:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
            raise ValueError(f"{asked[0]}: expected one of these flags at most, got {flags}")

    def wants(self, run: Run) -> bool:
        """Return whether a run of the plan is asked for now."""
        return (
            (not self.sets or run.data_set in self.sets)
            and (not self.arms or run.arm in self.arms)
            and (not self.seeds or run.seed in self.seeds)
        )


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, "one-stage", argv)
    plan = read_plan(cfg.plan)
    _expect_known(cfg, plan)
    if cfg.pack:
        datasets.pack(plan, cfg.data, iconify=cfg.iconify, countries=cfg.countries)
        found = json.dumps(datasets.digests(plan, cfg.data), indent=2)
        out = make_console()
        out.print(f"data of the plan: {found}", highlight=False, soft_wrap=True)
        for each in datasets.separations(plan, cfg.data):
            out.print(str(each), highlight=False, soft_wrap=True)
        return
    if cfg.calibrate:
        time_steps(cfg, plan)
        return
    if not cfg.table_only:
        datasets.expect_data(plan, cfg.data)
        if not cfg.tune:
            plan.expect_tuned()
            plan.expect_committed()
        run_missing(cfg, plan, plan.tuning_runs() if cfg.tune else plan.counted_runs())
    rows = finished(plan, cfg.ledger)
    if cfg.tune:
        make_console().print(tuning_table(plan, rows))
        told = json.dumps(chosen(plan, rows), indent=2)
        make_console().print(f"tuned of the plan: {told}", highlight=False, soft_wrap=True)
        return
    show(plan, rows)
    draw_arms(cfg, plan, rows)


def show(plan: Plan, rows: Rows) -> None:
    """Print the runs that count, the arms compared, and the verdict once all have run."""
    out = make_console()
    out.print(counted_table(plan, rows))
    compared = comparisons(plan, rows)
    for each in compared.values():
        out.print(comparison_table(each))
    if is_complete(plan, rows) and len(compared) > 1:  # of one seed there is no interval
        for sentence in sentences(judge(compared)):
            out.print(sentence, highlight=False)


def draw_arms(cfg: Config, plan: Plan, rows: Rows) -> None:
    """Draw what all arms have run, and what their terms did, beside the ledger.

    To one_stage_PLAN.svg, of two seeds and more, and to one_stage_PLAN_terms.svg.
    """
    title = plan.title + ("" if is_complete(plan, rows) else ", so far")
    pictures = {}
    if compared := comparisons(plan, rows):
        pictures[f"{SUBJECT}_{plan.name}.svg"] = draw(compared, title)
    if terms := stage_terms(plan, rows):
        pictures[f"{SUBJECT}_{plan.name}_terms.svg"] = draw_terms(terms, title)
    for name, picture in pictures.items():
        path = (cfg.ledger or results_dir()) / name
        write_atomically(path, picture.encode())
        logger.info("drawn to %s", path)


def _expect_known(cfg: Config, plan: Plan) -> None:
    seeds = plan.tuning.seeds if cfg.tune else plan.seeds
    of_plan = {"arms": plan.arms, "sets": tuple(plan.primary), "seeds": seeds}
    for name, known in of_plan.items():
        if unknown := [each for each in getattr(cfg, name) if each not in known]:
            raise ValueError(
                f"{name}: expected some of {', '.join(map(str, known))}, which {plan.path.name} "
                f"has, got {unknown}; another plan is another file"
            )


# ---- Runs ----------------------------------------------------------------------------------------


def finished(plan: Plan, ledger: Path | None) -> Rows:
    """Return the figures of the plan's rows.

    Raises ValueError where a counted row is of this plan's name with other files, or counted twice.
    """
    found: Rows = {}
    for row in read_rows(SUBJECT, folder=ledger):
        figures = row["figures"]
        if figures["plan"] != plan.name:
            continue
        tuning = Tuning(lr=figures["lr"], label_weight=figures["label_weight"])
        names = ("data_set", "arm", "seed", "is_counted")
        run = Run(tuning=tuning, **{name: figures[name] for name in names})
        if run.is_counted:
            if figures["plan_sha256"] != plan.digest:
                raise ValueError(
                    f"{plan.path}: expected the plan that {run.name} was run by, SHA-256 "
                    f"{figures['plan_sha256'][:12]}, got {plan.digest[:12]}; restore it, and give "
                    "a changed plan another name"
                )
            if run in found:
                raise ValueError(f"{SUBJECT}.jsonl: expected {run.name} once, got it twice")
        elif figures["steps"] != list(plan.steps(run)):
            continue  # tried before the plan had today's step times
        found[run] = figures
    return found


def run_missing(cfg: Config, plan: Plan, runs: Iterable[Run]) -> None:
    """Run what is asked for and has no row, `jobs` at a time. Raises RuntimeError for failures."""
    done = finished(plan, cfg.ledger)
    todo = [run for run in runs if cfg.wants(run) and run not in done]
    failures: dict[str, str] = {}
    with Progress(console=console) as bar:
        task = bar.add_task("runs", total=len(todo))
        for run, future in _as_they_end(cfg, plan, todo):
            if (error := future.exception()) is None:
                _record(cfg, plan, run, future.result())
                if run.is_counted:
                    draw_arms(cfg, plan, finished(plan, cfg.ledger))
            else:
                failures[run.name] = f"{type(error).__name__}: {error}"
            bar.advance(task)
    if failures:
        told = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise RuntimeError(f"{told}; the same command goes on from what has ended well")


def _as_they_end(
    cfg: Config, plan: Plan, todo: list[Run]
) -> Iterator[tuple[Run, Future[dict[str, Any]]]]:
    """Yield each run as it ends; a process a run, so that where one is killed others go on."""
    left = list(reversed(todo))
    running: dict[Future[dict[str, Any]], tuple[Run, Executor]] = {}
    try:
        while left or running:
            while left and len(running) < cfg.jobs:  # so that Ctrl-C leaves none to be started
                run, pool = left.pop(), child_processes(1)
                running[pool.submit(run_job, job_of(cfg, plan, run))] = run, pool
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, pool = running.pop(future)
                pool.shutdown()
                yield run, future
    finally:
        for _, pool in running.values():
            pool.shutdown(cancel_futures=True)


def job_of(cfg: Config, plan: Plan, run: Run) -> Job:
    """Return what a process needs to know of a run of the plan."""
    return Job(
        run=run,
        steps=plan.steps(run),
        data=tuple(cfg.data / plan.stage_folder(run, stage) for stage in ARMS.get(run.arm, ())),
        whole=cfg.data / plan.folder(run, is_whole=True),
        masks=cfg.data / datasets.masks_of(plan, run),
        out=cfg.out / plan.name,
    )


def _record(cfg: Config, plan: Plan, run: Run, found: dict[str, Any]) -> None:
    about = asdict(run)
    tuning = about.pop("tuning")
    about |= {"plan": plan.name, "steps": list(plan.steps(run)), "fold": plan.fold(run)}
    about["plan_sha256"] = plan.digest if run.is_counted else None
    append_row(SUBJECT, {**about, **tuning, **found}, folder=cfg.ledger)
    console.print(run.name, highlight=False, soft_wrap=True)


def time_steps(cfg: Config, plan: Plan) -> None:
    """Time a step of each method on each data set in turn, `jobs` at a time as they will be run.

    Raises ValueError where the plan's step times are those of another one.
    """
    if plan.step_times:
        raise ValueError(
            f"--calibrate: expected a plan with step times of its own, got those of "
            f"{plan.step_times} in {plan.path.name}; name that one, or leave step_times out"
        )
    rounds: dict[SetName, dict[str, list[float]]] = {
        name: defaultdict(list) for name in plan.primary
    }
    with Progress(console=console) as bar, child_processes(cfg.jobs) as pool:
        waiting = []
        for _ in range(ROUNDS):
            for name in plan.primary:
                run = next(run for run in plan.tuning_runs() if run.data_set == name)
                for method in plan.methods:
                    data = cfg.data / plan.stage_folder(run, Stage(method))
                    train = stage_config(Stage(method), num_classes=NUM_CLASSES[name], data=data)
                    waiting.append((name, method, pool.submit(step_seconds, train)))
        for name, method, job in bar.track(waiting, description="steps of each method"):
            rounds[name][method].append(job.result())
    console.print(f"wrote {plan.write_step_times(rounds, jobs=cfg.jobs)}", soft_wrap=True)
