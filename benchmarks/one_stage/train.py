"""One run of the experiment, in a process of its own: its stages one after the other, measured."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from m3i_fast.benchmarks.methods.run import is_trained, training_figures
from m3i_fast.benchmarks.one_stage.arms import ARMS, OURS, stage_config
from m3i_fast.benchmarks.one_stage.measures import (
    Found,
    counts_by_cluster,
    figure,
    measure_earth,
    measure_styles,
    measure_untrained_earth,
    measure_untrained_styles,
)
from m3i_fast.benchmarks.one_stage.plan import BASELINES, Run
from m3i_fast.config import TrainConfig
from m3i_fast.config.convert import differences
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl

NUM_PARTS = 5
_OF_TERMS = ("loss/", "gradient/", "gradient_cosine/", "members/", "monitor/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a process needs to know of a run."""

    run: Run
    steps: tuple[int, ...]
    """Of each stage."""
    data: tuple[Path, ...]
    """What each stage is trained on."""
    whole: Path
    """The same pictures with all labels and captions, which measures use."""
    masks: Path
    """Tiles and land cover of the Earth's data set."""
    out: Path
    """Folder of the run's stages."""

    def configs(self) -> list[TrainConfig]:
        """Return the config of each stage; those after the first start from the one before."""
        configs = []
        for number, (stage, num_steps, data) in enumerate(
            zip(ARMS[self.run.arm], self.steps, self.data, strict=True)
        ):
            cfg = stage_config(
                stage, num_classes=self.run.num_classes, data=data, seed=self.run.seed
            )
            init = f"run:{self.stage_folder(number - 1)}" if number else cfg.init
            configs.append(replace(self.run.tuning.of(cfg), num_steps=num_steps, init=init))
        return configs

    def stage_folder(self, number: int) -> Path:
        return self.out / self.run.name / f"stage-{number}"


def run_job(job: Job) -> dict[str, Any]:
    """Train a run, or go on with it, and return its row's figures.

    Raises InterruptedError after a checkpoint at SIGINT or SIGTERM, and what Trainer raises.
    """
    torch.set_num_threads(1)
    if job.run.arm == BASELINES:
        return {"stages": [], **_with_figures(_measure_baselines(job))}
    stages = []
    for number, cfg in enumerate(job.configs()):
        out = job.stage_folder(number)
        if not (out.exists() and is_trained(out)):
            _train(cfg, out)
        rows = read_jsonl(out / "metrics.jsonl")
        logged = means_by_part(rows, cfg.num_steps)
        stages.append({**training_figures(cfg, rows), "logged": logged})
    found = _with_figures({"trained": _measure(job, out)})
    if not job.run.is_counted:  # settings are chosen by figures
        found = {"measured": found["measured"]}
    return {"stages": stages, **found}


def means_by_part(
    rows: Iterable[Mapping[str, float]], num_steps: int
) -> dict[str, list[float | None]]:
    """Return the means of what a run logged of its terms, over each fifth of its steps in turn.

    Name of the metric -> a number a fifth, None where nothing finite was logged. They say what
    each term pulled at the encoder by, and whether a target was worth predicting.
    """
    values: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(NUM_PARTS)])
    for row in rows:
        part = min(int(NUM_PARTS * (row["step"] - 1) / num_steps), NUM_PARTS - 1)
        for name, value in row.items():
            if name.startswith(_OF_TERMS) and math.isfinite(value):
                values[name][part].append(value)
    return {
        name: [float(f"{sum(part) / len(part):.5g}") if part else None for part in parts]
        for name, parts in values.items()
    }


def _train(cfg: TrainConfig, out: Path) -> None:
    resume = bool(checkpoint.checkpoints(out / "checkpoints"))
    if resume:
        if (then := TrainConfig.load(out / "config.json")) != cfg:
            raise ValueError(
                f"{out}: expected a run of this plan, got one of another config; remove it\n"
                + "\n".join(differences(then, cfg))
            )
    elif out.exists():  # stopped before its first checkpoint
        shutil.rmtree(out)
    outcome = Trainer(cfg, out, resume=resume).train()
    if outcome.signal is not None:
        raise InterruptedError(
            f"signal {outcome.signal} at step {outcome.step} of {cfg.num_steps}; the same command "
            "goes on from there"
        )


def _measure(job: Job, out: Path) -> Found:
    if job.run.data_set == "styles":
        return measure_styles(out, job.whole, tune=not job.run.is_counted)
    return measure_earth(out, job.masks, "validation" if job.run.is_counted else "tune")


def _measure_baselines(job: Job) -> dict[str, Found]:
    cfg = stage_config(
        ARMS[OURS][0], num_classes=job.run.num_classes, data=job.whole, seed=job.run.seed
    )
    if job.run.data_set == "styles":
        return measure_untrained_styles(cfg)
    return measure_untrained_earth(cfg, job.masks, "validation")


def _with_figures(found: dict[str, Found]) -> dict[str, Any]:
    """Put each measure's figure beside what it is made of, and each list of clusters once."""
    figures = {
        who: {name: float(figure(counts_by_cluster(of)[1])) for name, of in measures.items()}
        for who, measures in found.items()
    }
    lists: list[Any] = []
    for measures in found.values():
        for of in measures.values():
            if of["cluster"] not in lists:
                lists.append(of["cluster"])
            of["cluster"] = lists.index(of["cluster"])
    return {"measured": figures, "clusters": lists, "found": found}


def measure_of(figures: dict[str, Any], who: str, name: str) -> dict[str, Any]:
    """Return a measure of a row as `measures` made it."""
    found: dict[str, Any] = figures["found"][who][name]
    return {**found, "cluster": figures["clusters"][found["cluster"]]}
