"""What each term of M3I brings to the demo, at the same number of steps.

    m3i-fast bench demo_ablation --num-steps 1500
    m3i-fast bench demo_ablation --num-steps 1500 --table-only

One ledger row a run; what has a row is not run again, and an unfinished run is resumed. A row keeps
every held-out item's hit, so that the table's differences carry paired bootstrap intervals.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress

from m3i_fast.benchmarks.harness import append_row, read_rows
from m3i_fast.config import TrainConfig
from m3i_fast.engine.evaluator import evaluate
from m3i_fast.engine.trainer import Trainer
from m3i_fast.evaluation.statistics import paired_bootstrap
from m3i_fast.pipelines.manifest import is_dataset
from m3i_fast.recipes import demo, pack_demo

SUBJECT = "demo_ablation"
MEASURES = {
    "knn_top1": "kNN",
    "linear_top1": "linear",
    "caption_to_image_recall_at_5": "caption to image R@5",
    "image_to_caption_recall_at_5": "image to caption R@5",
    "patch_correspondence": "patch found again",
}
console = Console()


def _only(*names: str) -> Callable[[TrainConfig], TrainConfig]:
    def change(cfg: TrainConfig) -> TrainConfig:
        terms = tuple(t if t.name in names else replace(t, weight=0.0) for t in cfg.objective.terms)
        return replace(cfg, objective=replace(cfg.objective, terms=terms))

    return change


def _unmixed(cfg: TrainConfig) -> TrainConfig:
    mixing = replace(cfg.objective.mixing, mode="none")
    return replace(
        cfg, data=replace(cfg.data, pairs=False), objective=replace(cfg.objective, mixing=mixing)
    )


METHODS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "m3i": lambda cfg: cfg,
    "intra only": _only("intra"),
    "inter only": _only("inter"),
    "category only": _only("category"),
    "caption only": _only("caption"),
    "no mixing": _unmixed,
    "category + caption": _only("category", "caption"),
    "category + caption, no mixing": lambda cfg: _unmixed(_only("category", "caption")(cfg)),
}


@dataclass(frozen=True, kw_only=True)
class Ablation:
    num_steps: int = 1500
    """Steps of every run."""
    labelled: tuple[float, ...] = (1.0, 0.1)
    """Shares of the training concepts that are fully annotated."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every method."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time; each gets its share of the cores."""
    data: Path = Path("data")
    """Where the data sets lie, or are packed to."""
    out: Path = Path("runs/ablation")
    """Where the run directories go."""
    ledger: Path | None = None
    """Folder of the ledger; None: benchmarks/results of the checkout."""
    table_only: bool = False
    """Print the table of the ledger's rows and run nothing."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One row of the ablation."""

    method: str
    labelled: float
    seed: int
    num_steps: int
    recipe: str
    """Digest of the method's config: rows of an older recipe are neither reused nor tabulated."""

    @property
    def name(self) -> str:
        method = "".join(c if c.isalnum() else "_" for c in self.method)
        return f"{method}-{self.labelled:g}-{self.seed}-{self.num_steps}-{self.recipe}"


def recipe_digest(method: str) -> str:
    """Of the demo's config with the method's change, whatever its data, seed and length."""
    return hashlib.sha256(METHODS[method](demo()).to_json().encode()).hexdigest()[:8]


def main(argv: list[str] | None = None) -> None:
    ablation = tyro.cli(Ablation, prog="python -m m3i_fast.benchmarks.demo_ablation", args=argv)
    if not ablation.table_only:
        run_missing(ablation)
    for labelled in ablation.labelled:
        text = table(ablation.num_steps, labelled, ablation.ledger)
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_missing(ablation: Ablation) -> None:
    """Run what the ledger has no row for, `jobs` at a time."""
    done = {run for run, _ in _finished(ablation.ledger)}
    todo = [run for run in _planned(ablation) if run not in done]
    for labelled in {run.labelled for run in todo}:
        if not is_dataset(_dataset(ablation, labelled)):
            pack_demo(_dataset(ablation, labelled), labelled=labelled)
    threads = max((os.cpu_count() or 1) // ablation.jobs, 1)
    context = multiprocessing.get_context("spawn")
    with Progress(console=console) as bar, ProcessPoolExecutor(ablation.jobs, context) as pool:
        task = bar.add_task("runs", total=len(todo))
        pending = {pool.submit(run_one, run, ablation, threads): run for run in todo}
        for future in as_completed(pending):
            run = pending[future]
            append_row(SUBJECT, {**asdict(run), **future.result()}, folder=ablation.ledger)
            bar.advance(task)
            console.print(f"{run.name}: done")


def run_one(run: Run, ablation: Ablation, num_threads: int) -> dict[str, Any]:
    """Train and evaluate one method; returns its figures and hits."""
    cfg = METHODS[run.method](demo(data=_dataset(ablation, run.labelled), seed=run.seed))
    cfg = replace(cfg, num_steps=run.num_steps, num_threads=num_threads)
    out = ablation.out / run.name
    resume = (out / "checkpoints").is_dir() and any((out / "checkpoints").glob("step_*"))
    if not resume and out.exists():
        os.rename(out, out.with_name(f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
    began = time.perf_counter()
    Trainer(cfg, out, resume=resume).train()
    seconds = time.perf_counter() - began
    figures, measured = evaluate(out)
    figures.pop("trained_minus")
    hits = {
        who: {name: _encode(values.tolist()) for name, values in measured[who].hits.items()}
        for who in ("trained", "untrained", "pixels")
    }
    return {**figures, "train_seconds": seconds, "resumed": resume, "hits": hits}


def table(num_steps: int, labelled: float, ledger: Path | None = None) -> str:
    """Markdown: each method's mean in percent, and M3I's minus its own with the 95 % interval.

    Items are resampled, each with its mean over the seeds that both methods ran.
    """
    hits: dict[str, dict[int, Any]] = {}
    for run, figures in _finished(ledger):
        if (run.num_steps, run.labelled) == (num_steps, labelled):
            hits.setdefault(run.method, {})[run.seed] = figures["hits"]
    if "m3i" not in hits:
        return f"labelled {labelled:g}, {num_steps} steps: no m3i row in the ledger"
    ours = hits["m3i"]
    lines = [
        f"labelled {labelled:g}, {num_steps} steps, seeds {sorted(ours)}; in brackets M3I minus "
        "the row, 95 % interval",
        "",
        "| method | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
    ]
    rows = [(method, theirs, "trained") for method, theirs in hits.items()]
    rows += [("untrained", ours, "untrained"), ("raw pixels", ours, "pixels")]
    for name, theirs, who in rows:
        cells = [_cell(ours, theirs, who, measure) for measure in MEASURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(ours: dict[int, Any], theirs: dict[int, Any], who: str, measure: str) -> str:
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or measure not in theirs[seeds[0]][who]:
        return "-"
    values = _item_means([theirs[seed][who][measure] for seed in seeds])
    cell = f"{100 * sum(values) / len(values):.1f}"
    if theirs is ours and who == "trained":
        return cell
    interval = paired_bootstrap(
        _item_means([ours[seed]["trained"][measure] for seed in seeds]), values
    )
    mean, low, high = (
        f"{100 * value:+.1f}" for value in (interval.difference, interval.low, interval.high)
    )
    return f"{cell} ({mean}: {low} to {high})"


def _item_means(runs: list[str | list[float]]) -> list[float]:
    """Hits of several seeds, each "0110..." or shares -> the mean hit of every item."""
    return [sum(map(float, item)) / len(item) for item in zip(*runs, strict=True)]


def _planned(ablation: Ablation) -> list[Run]:
    unknown = set(ablation.methods) - set(METHODS)
    if unknown:
        raise SystemExit(f"--methods: expected some of {list(METHODS)}, got {sorted(unknown)}")
    return [
        Run(
            method=method,
            labelled=labelled,
            seed=seed,
            num_steps=ablation.num_steps,
            recipe=recipe_digest(method),
        )
        for seed in ablation.seeds
        for labelled in ablation.labelled
        for method in ablation.methods
    ]


def _finished(ledger: Path | None) -> Iterator[tuple[Run, dict[str, Any]]]:
    for row in read_rows(SUBJECT, folder=ledger):
        figures = row["figures"]
        run = Run(**{field.name: figures[field.name] for field in fields(Run)})
        if run.method in METHODS and run.recipe == recipe_digest(run.method):
            yield run, figures


def _dataset(ablation: Ablation, labelled: float) -> Path:
    return ablation.data / ("openmoji" if labelled == 1.0 else f"openmoji-labelled-{labelled:g}")


def _encode(hits: list[float]) -> str | list[float]:
    """One character an item where hits are 0 or 1, which keeps a row readable; else shares."""
    if set(hits) <= {0.0, 1.0}:
        return "".join("01"[int(hit)] for hit in hits)
    return [round(hit, 3) for hit in hits]


if __name__ == "__main__":
    main()
