"""Methods on one data set with one budget, M3I with one thing changed, few annotations, a pilot.

    m3i-fast bench methods                      every method, 90 s of training a run
    m3i-fast bench methods --num-steps 700      the same number of steps instead
    m3i-fast bench methods --ablations          M3I with one thing changed at a time
    m3i-fast bench methods --annotations        with 1 % and 3 % of the classes and captions
    m3i-fast bench methods --growth             four methods with 30, 90, 270 and 810 s
    m3i-fast bench methods --pilot --seeds 0,1,2   the pilot and its power calculation
    m3i-fast bench methods --targets --seeds 0,1,2,3,4   what iBOT's terms and a captioner are worth
    m3i-fast bench methods --pilot --calibrate  times a step of each of its arms, once for all
    m3i-fast bench methods --dataset openmoji-tune ...   to choose settings by, see --help
    m3i-fast bench methods --table-only

One ledger row a run. What has a row is not run again, and a run that was stopped or killed goes on
from its checkpoint with the number of steps it had. A time is made steps of by a calibration of
each method before anything is trained; a method that has a row for any time, seed or share takes
the speed of that. The arms of --pilot and --targets take theirs from a committed file, the same on
all machines. A method that sees no class and no caption is trained once for all shares of them. A
row keeps every held-out item's hit, so that the table's differences carry paired
intervals. Methods with a frozen encoder take that of the supervised run of the same seed, data and
budget, which is run first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    as_completed,
    wait,
)
from dataclasses import asdict, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from rich.progress import Progress

from m3i_fast.benchmarks.core.child_processes import child_processes
from m3i_fast.benchmarks.core.command import read_command
from m3i_fast.benchmarks.ledger.rows import append_row, read_rows, results_dir
from m3i_fast.benchmarks.methods import plan, step_times
from m3i_fast.benchmarks.methods.growth_plot import draw_growth
from m3i_fast.benchmarks.methods.plan import (
    FIRST_DATA,
    TEACHER,
    Config,
    Group,
    Pace,
    Run,
)
from m3i_fast.benchmarks.methods.plot import draw
from m3i_fast.benchmarks.methods.run import is_trained, measure_untrained, train_and_measure
from m3i_fast.benchmarks.methods.sample_size_table import compare_arms, draw_power, power_table
from m3i_fast.benchmarks.methods.table import (
    OURS,
    UNTRAINED,
    Line,
    Rows,
    brief_table,
    summarise,
    table,
)
from m3i_fast.benchmarks.methods.variants import NOTE
from m3i_fast.config import TrainConfig
from m3i_fast.durable_files import write_atomically
from m3i_fast.pipelines.dataset.manifest import DEMO_FLAGS, is_dataset, read_manifest
from m3i_fast.pipelines.sources.openmoji import expect_split_clusters
from m3i_fast.planning.step_budget import calibrate, step_seconds
from m3i_fast.recipes import pack_demo
from m3i_fast.terminal import make_console

SUBJECT = "methods"
TUNED_BY = 0.2  # share of the training concepts that settings are chosen by
CHECKPOINT_EVERY = 100  # steps; what a run that is killed loses at most
console = make_console(stderr=True)
logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    cfg = read_command(Config, SUBJECT, argv)
    if cfg.calibrate:
        time_steps(cfg)
        return
    failures = {} if cfg.table_only else run_missing(cfg)
    rows = {group: _rows(cfg, group) for group in cfg.groups}
    lines_by_group = {group: summarise(of_group) for group, of_group in rows.items()}
    for group, lines in lines_by_group.items():
        text = (
            brief_table(lines, group.title, shown=cfg.shown)
            if cfg.brief
            else table(lines, group.title, shown=cfg.shown, note=NOTE if cfg.ablations else "")
        )
        make_console().print(text, highlight=False, soft_wrap=True)
    _draw(cfg, lines_by_group)
    if cfg.pilot:
        _plan_by(cfg, rows)
    if failures:
        told = "; ".join(f"{run.name}: {why}" for run, why in failures.items())
        raise RuntimeError(f"{told}; the same command goes on from what has ended well")


def _plan_by(cfg: Config, rows: dict[Group, Rows]) -> None:
    """Print and draw what a difference needs, from the pilot's rows."""
    for group, of_group in rows.items():
        comparisons = compare_arms(of_group, holm=cfg.holm)
        make_console().print(power_table(comparisons), highlight=False, soft_wrap=True)
        if comparisons:
            svg = draw_power(comparisons, group.title)
            _write_picture(cfg, f"{_picture(cfg, group)}_power", svg)


def _draw(cfg: Config, lines_by_group: dict[Group, list[Line]]) -> None:
    """Draw each group, or how all of them grow, to methods.svg or beside it."""
    if not cfg.growth:
        pictures = {
            group: draw(lines, group.title, shown=cfg.shown)
            for group, lines in lines_by_group.items()
            if lines
        }
    else:
        pictures = {}
        for shares in cfg.annotated:
            growing = {
                group: lines
                for group, lines in lines_by_group.items()
                if lines and group.shares == shares
            }
            if growing:
                svg = draw_growth({group.budget: lines for group, lines in growing.items()})
                pictures[next(iter(growing))] = svg
    for group, svg in pictures.items():
        _write_picture(cfg, _picture(cfg, group), svg)


def _picture(cfg: Config, group: Group) -> str:
    """Its name: that of the plan, of the data and, where there are several, of the shares."""
    words = [
        SUBJECT,
        cfg.plan if cfg.plan != SUBJECT else "",
        cfg.dataset if cfg.dataset != "openmoji" else "",
        _shares(*group.shares) if len(cfg.annotated) > 1 else "",
    ]
    return "_".join(filter(None, words))


def _write_picture(cfg: Config, name: str, svg: str) -> None:
    path = (cfg.ledger or results_dir()) / f"{name}.svg"
    write_atomically(path, svg.encode())
    logger.info("drawn to %s", path)


def time_steps(cfg: Config) -> None:
    """Time a step of each of the plan's arms in turn, `jobs` at a time as they will be trained."""
    _pack(cfg, 1.0, 1.0)
    [group] = cfg.groups
    _pack(cfg, *group.shares)
    data = _data_digest(cfg)
    runs = {name: group.run(name, 0, data=data) for name in cfg.arms}
    with Progress(console=console) as bar, child_processes(cfg.jobs) as pool:
        jobs = [
            (name, pool.submit(step_seconds, _train_config(cfg, run)))
            for _ in range(step_times.ROUNDS)
            for name, run in runs.items()
        ]
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        for name, job in bar.track(jobs, description="steps of each arm"):
            rounds[name].append(job.result())
    path = step_times.write_step_times(
        cfg.plan, rounds, num_threads=cfg.num_threads, jobs=cfg.jobs, dataset=cfg.dataset
    )
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def run_missing(cfg: Config) -> dict[Run, str]:
    """Run what the ledger has no row for, `jobs` at a time; returns what failed, and why."""
    _pack(cfg, 1.0, 1.0)
    todo = _missing(cfg)
    for run in todo:
        _pack(cfg, run.labelled, run.captioned)
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
    """Each run as it ends, those with a teacher after it, and not at all where it failed.

    A process a run: where one is killed, the others go on.
    """
    order = TopologicalSorter({run: [run.teacher] if run.teacher in todo else [] for run in todo})
    order.prepare()
    ready: list[Run] = []
    running: dict[Future[dict[str, Any]], tuple[Run, Executor]] = {}
    try:
        while order.is_active():
            ready += order.get_ready()
            while ready and len(running) < cfg.jobs:  # so that Ctrl-C leaves none to be started
                run, pool = ready.pop(0), child_processes(1)
                running[_submit(cfg, pool, run, todo[run])] = run, pool
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, pool = running.pop(future)
                pool.shutdown()
                yield run, future
                if future.exception() is None:
                    order.done(run)
    finally:
        for _, pool in running.values():
            pool.shutdown(cancel_futures=True)


def _submit(cfg: Config, pool: Executor, run: Run, num_steps: int | None) -> Future[dict[str, Any]]:
    if run.method == UNTRAINED:
        return pool.submit(measure_untrained, _train_config(cfg, run), cfg.split)
    return pool.submit(train_and_measure, *_job(cfg, run, num_steps))


def _missing(cfg: Config) -> dict[Run, int | None]:
    """Return what is to be run, each with its number of steps where that is known.

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
    with Progress(console=console) as bar, child_processes(cfg.jobs) as pool:
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
    """Every run of the plan, once where several groups have it."""
    data, steps = _data_digest(cfg), _fixed_steps(cfg)
    planned: dict[Run, None] = {}
    for seed in map(int, cfg.seeds.split(",")):
        for group in cfg.groups:
            names = [UNTRAINED] if not cfg.chosen or OURS in cfg.chosen else []
            names += [name for name in group.methods if not cfg.chosen or name in cfg.chosen]
            runs = (group.run(name, seed, data=data, steps=steps) for name in names)
            planned |= dict.fromkeys(runs)
    return iter(planned)


def _fixed_steps(cfg: Config) -> dict[str, int]:
    """Arm -> its number of steps, where that follows from committed times and not from a budget."""
    if cfg.plan not in plan.PACED or cfg.calibrate or cfg.num_steps is not None:
        return {}
    return step_times.step_counts(cfg.plan, cfg.arms, cfg.seconds)


def _train_config(cfg: Config, run: Run) -> TrainConfig:
    data = _dataset(cfg, run.labelled, run.captioned)
    train = plan.config_of(run.method, data=data, seed=run.seed)
    return replace(train, num_threads=cfg.num_threads, checkpoint_every=CHECKPOINT_EVERY)


def _job(
    cfg: Config, run: Run, num_steps: int | None
) -> tuple[TrainConfig, Path, float | None, Path, str]:
    """Return the arguments of `train_and_measure`.

    Every run is measured by all labels and captions, whatever share it was trained with.
    """
    train, whole = _train_config(cfg, run), _dataset(cfg, 1.0, 1.0)
    if run.teacher is not None:
        weights = str(cfg.out / run.teacher.name)
        train = replace(train, objective=replace(train.objective, teacher=weights))
    if num_steps is None:
        return train, cfg.out / run.name, run.seconds, whole, cfg.split
    return replace(train, num_steps=num_steps), cfg.out / run.name, None, whole, cfg.split


def _record(cfg: Config, run: Run, figures: dict[str, Any]) -> None:
    teacher = run.teacher.name if run.teacher else None
    about = {**asdict(run), "teacher": teacher, "recipes": plan.recipe_trees(run.method)}
    append_row(SUBJECT, about | figures, folder=cfg.ledger)
    console.print(f"{run.name}: {figures['num_steps']} steps", highlight=False)


def _finished(ledger: Path | None) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yield the rows of today's recipes, oldest first."""
    for row in read_rows(SUBJECT, folder=ledger):
        if (run := Run.of(row["figures"])) is not None:
            yield run, row


def _rows(cfg: Config, group: Group) -> Rows:
    """All seeds' newest rows of a group, in the order of its methods; then those of UNTRAINED."""
    names = (*group.methods, UNTRAINED)
    data, steps = _data_digest(cfg), _fixed_steps(cfg)
    wanted = {group.run(name, 0, data=data, steps=steps): name for name in names}
    rows: Rows = {name: {} for name in names}
    for run, row in _finished(cfg.ledger):
        if (name := wanted.get(replace(run, seed=0))) is not None:
            rows[name][run.seed] = row
    return {name: dict(sorted(seeds.items())) for name, seeds in rows.items() if seeds}


# ---- Data ----------------------------------------------------------------------------------------


def _dataset(cfg: Config, labelled: float, captioned: float) -> Path:
    whole = (labelled, captioned) == (1.0, 1.0)
    return cfg.data / "-".join([cfg.dataset, *([] if whole else [_shares(labelled, captioned)])])


def _shares(labelled: float, captioned: float) -> str:
    return f"labelled-{labelled:g}-captioned-{captioned:g}"


def _pack(cfg: Config, labelled: float, captioned: float) -> None:
    """Write the data set of these shares where there is none.

    Raises FileNotFoundError for one that is not made from packages alone, with the command that
    makes it, and ValueError where a data set of other shares lies there.
    """
    path = _dataset(cfg, labelled, captioned)
    if is_dataset(path):
        expect_split_clusters(path)
        settings = read_manifest(path).settings
        captions = settings.get("captioned")
        shares = settings["labelled"], settings["labelled"] if captions is None else captions
        if shares != (labelled, captioned):
            raise ValueError(
                f"{path}: expected classes of {labelled:g} and captions of {captioned:g} of the "
                f"concepts, got {shares[0]:g} and {shares[1]:g}; remove it, or name another --data"
            )
    elif cfg.dataset.startswith("openmoji"):
        whole = (labelled, captioned) == (1.0, 1.0)  # `data openmoji` says nothing of captions
        tune = TUNED_BY if cfg.split == "tune" else 0.0
        pack_demo(path, labelled=labelled, captioned=None if whole else captioned, tune=tune)
    else:
        raise FileNotFoundError(
            f"{path}: expected a data set, got none; type m3i-fast data {cfg.dataset} {path} "
            f"--labelled {labelled:g} --captioned {captioned:g} {DEMO_FLAGS}"
        )


def _data_digest(cfg: Config) -> str:
    """Of the data set, all annotated; where there is none, that of the newest row's."""
    path = _dataset(cfg, 1.0, 1.0)
    if is_dataset(path):
        return read_manifest(path).digest[: len(FIRST_DATA)]
    told = [run.data for run, _ in _finished(cfg.ledger) if run.dataset == cfg.dataset]
    return told[-1] if told else FIRST_DATA
