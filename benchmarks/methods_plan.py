"""What the methods' benchmark runs: groups that are compared, runs, and what tells them apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.methods_ablation import ANNOTATED, SHARES, VARIANTS
from m3i_fast.benchmarks.methods_growth import GROWTH
from m3i_fast.benchmarks.methods_table import OURS, UNTRAINED
from m3i_fast.config import TrainConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import demo_method

TEACHER = "supervised"
# Fields that configs did not have when the first rows were made, with what was done then.
ADDED: dict[str, object] = {
    "vision.drop_path_mode": "mask",
    "vision.position": "absolute",
    "text.activation_checkpointing": "none",
    "parallel.shard": 1,
    "parallel.chunk": 0,
    "parallel.accumulate": 1,
    "parallel.prefetch": 0,
    "optim.name": "adamw",
    "optim.impl": "auto",
    "optim.eps": None,
    "optim.layer_decay": 1.0,
    "optim.dcn_lr_scale": 1.0,
    "optim.freeze_patch_embed": False,
    "data.hw_decoder_load": None,
    "data.alternates": True,
    "data.max_pixels": 89_478_485,
    "guard.max_in_a_row": 10,
    "guard.max_share": 0.1,
    "guard.backoff_after": 3,
    "guard.backoff_scale": 0.5,
    "guard.backoff_steps": 200,
    "guard.spikes": "off",
    "guard.spike_deviations": 6.0,
    "guard.spike_window": 100,
    "guard.max_rollbacks": 3,
    "telemetry.hz": 1.0,
    "telemetry.prometheus_port": 0,
    "telemetry.prometheus_address": "127.0.0.1",
    "telemetry.wandb_project": "",
    "telemetry.mlflow_uri": "",
    "backend": "auto",
    "fp8_min_dim": 768,
    "cuda_graphs": False,
    "deterministic": False,
    "keep_every": 0,
    "keep_best": "",
    "async_checkpoint": True,
}

# Values that were written otherwise then.
FORMERLY: dict[str, dict[object, object]] = {
    "vision.activation_checkpointing": {"none": False, "full": True},
}

Pace = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    seconds: float = 90.0
    """Training time of a run on its share of the cores; a short calibration makes steps of it."""
    num_steps: int | None = None
    """Steps of every run, instead of a time."""
    ablations: bool = False
    """M3I's ablations instead of the methods."""
    growth: bool = False
    """A few methods with a third of the budget, with it, with three and nine times as much."""
    methods: str = ""
    """Run only these: m3i,byol. All unless given."""
    seeds: str = "0"
    """Seeds of every run: 0,1,2."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time; each gets its share of the cores."""
    data: Path = Path("data")
    """Where the data sets lie, or are packed to."""
    out: Path = Path("runs/methods")
    """Where the run directories go."""
    ledger: Path | None = None
    """Folder of the ledger and the picture; None: benchmarks/results of the checkout."""
    table_only: bool = False
    """Print the table of the ledger's rows and run nothing."""

    def __post_init__(self) -> None:
        for name in ("seconds", "num_steps", "jobs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected > 0, got {value}")
        if not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise ValueError(f"seeds: expected numbers as 0,1,2, got {self.seeds!r}")
        if self.ablations and self.growth:
            raise ValueError("ablations, growth: expected one of them at most, got both")
        known = dict.fromkeys(name for group in self.groups for name in group.methods)
        unknown = [name for name in self.chosen if name not in known]
        if unknown:
            raise ValueError(f"methods: expected some of {', '.join(known)}, got {unknown}")

    @property
    def num_threads(self) -> int:
        return max((os.cpu_count() or 1) // self.jobs, 1)

    def budget(self, times: float = 1.0) -> str:
        """What rows have to have in common to be compared."""
        if self.num_steps is not None:
            return f"{max(round(self.num_steps * times), 1)} steps"
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.seconds * times:g} s on {threads}"

    @property
    def chosen(self) -> list[str]:
        return [name.strip() for name in self.methods.split(",")] if self.methods else []

    @property
    def groups(self) -> tuple[Group, ...]:
        """A table each."""
        if self.growth:
            return tuple(Group(self.budget(times), 1.0, ANNOTATED) for times in GROWTH)
        if self.ablations:
            full = tuple(dict.fromkeys((OURS, *VARIANTS, *ANNOTATED)))
            return tuple(
                Group(self.budget(), share, full if share == 1.0 else ANNOTATED) for share in SHARES
            )
        return (Group(self.budget(), 1.0, tuple(METHODS)),)


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that are compared in one table."""

    budget: str
    labelled: float
    methods: tuple[str, ...]

    @property
    def title(self) -> str:
        share = f"{100 * self.labelled:g} %"
        return f"{self.budget} a run, classes of {share} of the concepts, captions of {share}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One row: what it is found by."""

    method: str
    labelled: float
    """Share of the training concepts with a class, and of those with a caption, drawn apart."""
    seed: int
    budget: str
    recipe: str
    """Digest of the method's config: rows of an older one are neither reused nor tabulated."""

    @property
    def name(self) -> str:
        """Of its directory."""
        parts = (self.method, f"{self.labelled:g}", str(self.seed), self.budget, self.recipe)
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in parts)

    @property
    def num_steps(self) -> int | None:
        """Where the budget is one of steps."""
        count, is_one, _ = self.budget.partition(" steps")
        return int(count) if is_one else None

    @property
    def seconds(self) -> float | None:
        """Where the budget is one of time."""
        return None if self.num_steps is not None else float(self.budget.partition(" s on ")[0])

    @property
    def pace(self) -> Pace:
        """What all runs that take a step in the same time have in common."""
        return self.method, self.recipe, self.budget.partition(" on ")[2]

    @property
    def teacher(self) -> Run | None:
        """The run whose encoder this one's frozen targets come from."""
        if not config_of(self.method).objective.uses(encoder="frozen"):
            return None
        return replace(self, method=TEACHER, recipe=recipe_digest(TEACHER))


def config_of(method: str, *, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """The demo with a method's terms and inputs, or with a variant of M3I's; UNTRAINED is M3I's."""
    if method in VARIANTS:
        return VARIANTS[method](demo_method(OURS, data=data, seed=seed))
    return demo_method(OURS if method == UNTRAINED else method, data=data, seed=seed)


def untrained(seed: int) -> Run:
    """What M3I's runs of a seed start from, whatever their budget; measured with raw pixels."""
    recipe = recipe_digest(UNTRAINED)
    return Run(method=UNTRAINED, labelled=1.0, seed=seed, budget="0 steps", recipe=recipe)


def recipe_digest(method: str) -> str:
    """Of the config, whatever its data, seed and length, and of its teacher's.

    A recipe for which a field of ADDED has its value is the one of before there was that field.
    """
    cfg = config_of(method)
    teacher = recipe_digest(TEACHER) if cfg.objective.uses(encoder="frozen") else ""
    settings = json.loads(cfg.to_json())
    for path, before in ADDED.items():
        section, name = _section(settings, path)
        if section[name] == before:
            del section[name]
    for path, values in FORMERLY.items():
        section, name = _section(settings, path)
        section[name] = values.get(section[name], section[name])
    text = json.dumps({k: v for k, v in settings.items() if v != {}}, indent=2) + "\n"
    return hashlib.sha256((text + teacher).encode()).hexdigest()[:8]


def _section(settings: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """What holds the field of that path, and the field's name there."""
    *sections, name = path.split(".")
    return reduce(dict.__getitem__, sections, settings), name
