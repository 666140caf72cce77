"""What the rows of a plan say: tried settings, runs that count, and the arms compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from m3i_fast.benchmarks.ledger.readme_tables import markdown
from m3i_fast.benchmarks.one_stage.arms import ARMS, Tuning
from m3i_fast.benchmarks.one_stage.measures import counts_by_cluster, figure
from m3i_fast.benchmarks.one_stage.plan import Plan, Run, SetName
from m3i_fast.benchmarks.one_stage.resampling import (
    ClusterCounts,
    Floats,
    balanced_seeds,
    resample,
)
from m3i_fast.benchmarks.one_stage.term_plot import Parts, StageTerms
from m3i_fast.benchmarks.one_stage.train import measure_of
from m3i_fast.benchmarks.one_stage.verdict import Comparison, compare

Rows = dict[Run, dict[str, Any]]
SECONDARY: dict[SetName, dict[str, str]] = {
    "styles": {
        "linear_top1_every_style": "linear probe, every style that was seen",
        "linear_top1": "linear probe, one drawing a concept",
        "knn_top1": "kNN",
        "few_label_top1": "few labels",
        "caption_to_image_recall_at_5": "caption to drawing R@5",
        "across_styles_top1": "a concept's drawing in another style",
        "linear_top1_unseen_style": "linear probe, unseen style",
        "knn_top1_unseen_style": "kNN, unseen style",
        "caption_to_image_recall_at_5_unseen_style": "caption to drawing R@5, unseen style",
    },
    "earth": {"patch_top1": "patches that are right"},
}
"""Measures that decide nothing: their names in rows, and as a reader shall read them."""
TITLES = {
    "linear_top1": "linear probe",
    "linear_top1_every_style_hard": "linear probe, hard half",
    "patch_miou": "mean IoU of patches",
}


def tuning_table(plan: Plan, rows: Rows) -> Table:
    """Show what each setting of each arm reached on the tuning split, by seed."""
    shown = Table(title=f"{plan.tuning.seconds:g} s a run, tuning split, %", box=box.SIMPLE_HEAD)
    seeds = [f"seed {seed}" for seed in plan.tuning.seeds]
    for head in ("data", "arm", "lr x", "labels x", *seeds):
        shown.add_column(head, justify="left" if head in ("data", "arm") else "right")
    for (name, arm), settings in _tried(plan, rows).items():
        for tuning, found in settings.items():
            cells = (f"{100 * found[s]:.1f}" if s in found else "" for s in plan.tuning.seeds)
            shown.add_row(name, arm, f"{tuning.lr:g}", f"{tuning.label_weight:g}", *cells)
    return shown


def chosen(plan: Plan, rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Return the setting of each arm with the highest mean over the tuning seeds.

    Arms of which a run has no row are left out; of settings that are equal the first is chosen.
    """
    best: dict[str, dict[str, dict[str, float]]] = {}
    for (name, arm), settings in _tried(plan, rows).items():
        if all(len(found) == plan.tuning.num_seeds for found in settings.values()):
            means = {tuning: fmean(found.values()) for tuning, found in settings.items()}
            best.setdefault(name, {})[arm] = asdict(max(means, key=means.__getitem__))
    return best


def _tried(plan: Plan, rows: Rows) -> dict[tuple[SetName, str], dict[Tuning, dict[int, float]]]:
    """Return what runs measured: data set and arm -> setting -> seed -> measure."""
    tried: dict[tuple[SetName, str], dict[Tuning, dict[int, float]]] = {}
    for run in plan.tuning_runs():
        found = tried.setdefault((run.data_set, run.arm), {}).setdefault(run.tuning, {})
        if run in rows:
            measured = rows[run]["measured"]["trained"]
            found[run.seed] = measured[plan.tuning.measure[run.data_set]]
    return tried


def counted_table(plan: Plan, rows: Rows) -> Table:
    """Show the primary measure of every run that counts."""
    shown = Table(title=f"{plan.title}: primary measures, %", box=box.SIMPLE_HEAD)
    for head in ("data", "arm", *map(str, plan.seeds)):
        shown.add_column(head)
    values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for run, figures in rows.items():
        if run.is_counted:
            measured = figures["measured"]
            for who, of in measured.items():
                arm = run.arm if who == "trained" else who
                if plan.primary[run.data_set] in of:
                    values[run.data_set, arm][run.seed] = of[plan.primary[run.data_set]]
    for (name, arm), of in sorted(values.items()):
        shown.add_row(name, arm, *(f"{100 * of[s]:.1f}" if s in of else "" for s in plan.seeds))
    return shown


def secondary_table(plan: Plan, rows: Rows) -> str:
    """Return the means over seeds of the secondary measures, in percent, as Markdown."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run, figures in rows.items():
        for who, of in figures["measured"].items() if run.is_counted else ():
            for measure, value in of.items():
                arm = run.arm if who == "trained" else who
                found[run.data_set, measure, arm].append(100 * value)
    arms = (*plan.arms, "untrained", "pixels")
    lines = []
    for name in plan.primary:
        for measure, title in SECONDARY[name].items():
            values = [found[name, measure, arm] for arm in arms]
            cells = [f"{sum(of) / len(of):.1f}" if of else "-" for of in values]
            lines.append([f"{name}: {title}", *cells])
    return markdown(["measure", *arms], lines)


def is_complete(plan: Plan, rows: Rows) -> bool:
    """Return whether every run of the plan has a row."""
    return all(run in rows for run in plan.counted_runs())


def comparisons(plan: Plan, rows: Rows) -> dict[str, Comparison]:
    """Compare the arms on each data set by the seeds that all of them have run, two at least."""
    compared: dict[str, Comparison] = {}
    for name, measure in plan.primary.items():
        runs = {arm: _of_seeds(rows, name, arm, measure) for arm in plan.arms}
        seeds = balanced_seeds(runs)
        if len(seeds) > 1:
            shared = {arm: {seed: of[seed] for seed in seeds} for arm, of in runs.items()}
            drawn = resample(shared, percent, num_draws=plan.rule.draws)
            compared[name] = compare(f"{name}: {TITLES.get(measure, measure)}, %", drawn)
    return compared


def stage_terms(plan: Plan, rows: Rows) -> dict[str, dict[str, list[StageTerms]]]:
    """Average over seeds what the terms of each arm's stages logged, by data set.

    An arm without a counted row is left out.
    """
    found: dict[str, dict[str, list[StageTerms]]] = {}
    for name, arm in product(plan.primary, plan.arms):
        runs = [
            figures["stages"]
            for run, figures in rows.items()
            if run.is_counted and (run.data_set, run.arm) == (name, arm)
        ]
        for stage, logs in zip(ARMS[arm], zip(*runs, strict=True), strict=bool(runs)):
            logged = [log["logged"] for log in logs]
            found.setdefault(name, {}).setdefault(arm, []).append(
                StageTerms(
                    share=stage.share,
                    gradient=_means(logged, "gradient/", ""),
                    explained=_means(logged, "monitor/", "_explained"),
                )
            )
    return found


def _means(
    logged: Sequence[Mapping[str, Parts]], before: str, after: str
) -> dict[str, list[float | None]]:
    """Return the means over runs of each metric called so, by what its name has in between."""
    found: dict[str, list[float | None]] = {}
    for name in sorted({name for of in logged for name in of}):
        if name.startswith(before) and name.endswith(after):
            parts = zip(*(of[name] for of in logged if name in of), strict=True)
            known = [[value for value in part if value is not None] for part in parts]
            term = name[len(before) : len(name) - len(after)]
            found[term] = [sum(part) / len(part) if part else None for part in known]
    return found


def percent(counts: Floats) -> Floats:  # [R, ...] summed over clusters -> [R]
    """Return `figure` in percent."""
    return np.asarray(100 * figure(counts[:, None]))


def _of_seeds(rows: Rows, name: SetName, arm: str, measure: str) -> dict[int, ClusterCounts]:
    """Return what an arm's runs got on each cluster, by seed."""
    found = {}
    for run, figures in rows.items():
        if run.is_counted and (run.data_set, run.arm) == (name, arm):
            cluster, counts = counts_by_cluster(measure_of(figures, "trained", measure))
            found[run.seed] = ClusterCounts(cluster=cluster, counts=counts)
    return found
