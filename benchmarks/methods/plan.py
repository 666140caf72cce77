"""What the methods' benchmark runs: groups that are compared, runs, and what tells them apart."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from m3i_fast.benchmarks.methods.growth_plot import GROWTH
from m3i_fast.benchmarks.methods.table import OURS, TITLES, UNTRAINED
from m3i_fast.benchmarks.methods.variants import AS_BEFORE, AS_IT_WAS, VARIANTS, WITH_TARGETS
from m3i_fast.config import TrainConfig
from m3i_fast.config.convert import to_tree
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import demo_method

TEACHER = "supervised"
# The arms of a plan that does not run every method. LABEL_FREE ones see neither class nor caption.
GROWING = (OURS, TEACHER, "clip", "category + caption")
LABEL_FREE = ("siameseim", "mae", "simclr")
PILOT = (TEACHER, "clip", "siameseim", "category + caption", OURS, "m3i: each alone")
TARGETS = (OURS, *WITH_TARGETS, "siameseim", "ibot", "dinov2", "tips", "siglip2")
# The data that rows were measured on which do not say it: the digest of `data/openmoji`.
FIRST_DATA = "69a82804"

NO_STEPS: Mapping[str, int] = {}
Pace = tuple[str, str, str, str]
Plan = Literal["methods", "ablations", "annotations", "growth", "pilot", "targets"]
Dataset = Literal["openmoji", "openmoji-tune", "styles"]
PLANS: tuple[Plan, ...] = ("ablations", "annotations", "growth", "pilot", "targets")  # a flag each
PACED: tuple[Plan, ...] = ("pilot", "targets")
"""Plans whose arms take as many steps as their committed step times say."""
# Of a plan, where not all training concepts are annotated: class and caption, drawn apart.
SHARES: dict[Plan, str] = {"annotations": "0.01,0.03", **dict.fromkeys(PACED, "0.03:0.3")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    seconds: float = 90.0
    """Training time of a run on its share of the cores; a short calibration makes steps of it, or
    with --pilot and --targets the committed time of a step."""
    num_steps: int | None = None
    """Steps of every run, instead of a time."""
    ablations: bool = False
    """Run M3I with one thing changed at a time, instead of the methods."""
    annotations: bool = False
    """Run M3I, its parts and label-free methods where few concepts are annotated."""
    growth: bool = False
    """Run a few methods with a third of the budget, with it, with three and nine times as much."""
    pilot: bool = False
    """Run the pilot's arms, each with the number of steps that its committed step time gives, and
    print how many clusters and seeds a difference needs."""
    targets: bool = False
    """Run M3I, M3I with iBOT's terms and with a captioner, and the methods whose targets these are,
    each with the number of steps that its committed step time gives."""
    calibrate: bool = False
    """Time a step of each arm of --pilot or --targets, write that plan's file of step times, and
    run nothing."""
    shares: str = ""
    """Shares of the training concepts with a class and with a caption, a table each: 0.01,0.03:0.3
    is 1 % of both, then 3 % and 30 %. Unless given 0.01,0.03 for --annotations, 0.03:0.3 for
    --pilot and --targets, else 1."""
    dataset: Dataset = "openmoji"
    """Data set of all runs, a folder below --data. openmoji-tune leaves a fifth of the training
    concepts out and measures by these: settings are chosen there, and not by held-out concepts."""
    methods: str = ""
    """Run only these: m3i,byol. All unless given."""
    measures: str = ""
    """Columns of the tables and panels of the picture: knn_top1,scene_patch_top1. All that was
    measured unless given; Holm's correction is over all of it either way."""
    seeds: str = "0"
    """Seeds of every run: 0,1,2."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time; each gets its share of the cores."""
    holm: bool = False
    """Plan every difference of the pilot at alpha over the number of a measure's comparisons, the
    first step of Holm's procedure, instead of at alpha."""
    data: Path = Path("data")
    """Where the data sets lie, or are packed to."""
    out: Path = Path("runs/methods")
    """Where the run directories go."""
    ledger: Path | None = None
    """Folder of the ledger and the picture; None: benchmarks/results of the checkout."""
    brief: bool = False
    """One table in place of four: both halves, and M3I minus each method after its value."""
    table_only: bool = False
    """Print the table of the ledger's rows and run nothing."""

    def __post_init__(self) -> None:
        for name in ("seconds", "num_steps", "jobs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected > 0, got {value}")
        if not re.fullmatch(r"\d+(,\d+)*", self.seeds):
            raise ValueError(f"seeds: expected numbers as 0,1,2, got {self.seeds!r}")
        if len(asked := [name for name in PLANS if getattr(self, name)]) > 1:
            raise ValueError(f"{', '.join(asked)}: expected one of them at most, got all of these")
        for name, plans in (("calibrate", PACED), ("holm", ("pilot",))):
            if getattr(self, name) and self.plan not in plans:
                flags = " or ".join(f"--{plan}" for plan in plans)
                raise ValueError(
                    f"{name}: expected {flags} with it, got none; type --{plans[0]} --{name}"
                )
        _ = self.annotated
        for field, known, named in (
            ("methods", self.arms, self.chosen),
            ("measures", tuple(TITLES), self.shown),
        ):
            if unknown := [name for name in named if name not in known]:
                raise ValueError(f"{field}: expected some of {', '.join(known)}, got {unknown}")

    @property
    def plan(self) -> Plan:
        return next((name for name in PLANS if getattr(self, name)), "methods")

    @property
    def num_threads(self) -> int:
        return max((os.cpu_count() or 1) // self.jobs, 1)

    def budget(self, times: float = 1.0) -> str:
        """Return the budget of a run in words, which rows share if they are compared."""
        if self.num_steps is not None:
            return f"{max(round(self.num_steps * times), 1)} steps"
        if self.plan in PACED:
            return f"{self.seconds:g} s at the committed pace"
        threads = f"{self.num_threads} thread{'s' * (self.num_threads > 1)}"
        return f"{self.seconds * times:g} s on {threads}"

    @property
    def split(self) -> str:
        """Return the split that runs are measured on."""
        return "tune" if self.dataset == "openmoji-tune" else "heldout"

    @property
    def chosen(self) -> list[str]:
        """Return the methods to run; empty: all."""
        return _names(self.methods)

    @property
    def shown(self) -> list[str]:
        """Return the measures to show; empty: all."""
        return _names(self.measures)

    @property
    def arms(self) -> tuple[str, ...]:
        """Return the methods and variants that the plan compares."""
        ours = (OURS, *AS_BEFORE)
        return {
            "methods": tuple(METHODS),
            "ablations": (OURS, *(name for name in VARIANTS if base_of(name) == OURS)),
            "annotations": (*ours, "category + caption", TEACHER, "clip", *LABEL_FREE),
            "growth": GROWING,
            "pilot": PILOT,
            "targets": TARGETS,
        }[self.plan]

    @property
    def annotated(self) -> tuple[tuple[float, float], ...]:
        """Return shares of the training concepts with a class and with a caption, a table each."""
        text = self.shares or SHARES.get(self.plan, "1")
        pairs = []
        for part in text.split(","):
            classes, _, captions = part.partition(":")
            try:
                pair = float(classes), float(captions or classes)
            except ValueError:
                pair = (-1.0, -1.0)
            if not all(0 <= share <= 1 for share in pair):
                raise ValueError(
                    f"shares: expected fractions as 0.01,0.03 or 0.03:0.3, got {part!r} of {text!r}"
                )
            pairs.append(pair)
        return tuple(pairs)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Return the groups of runs, a table each."""
        return tuple(
            Group(
                methods=self.arms,
                budget=self.budget(times),
                labelled=labelled,
                captioned=captioned,
                dataset=self.dataset,
            )
            for labelled, captioned in self.annotated
            for times in (GROWTH if self.growth else (1.0,))
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The runs that are compared in one table."""

    methods: tuple[str, ...]
    budget: str
    labelled: float = 1.0
    captioned: float = 1.0
    dataset: Dataset = "openmoji"

    @property
    def shares(self) -> tuple[float, float]:
        """Return the shares of training concepts with a class and with a caption."""
        return self.labelled, self.captioned

    @property
    def title(self) -> str:
        budget = f"{self.budget} a run"
        if self.dataset != "openmoji":
            budget += f", {self.dataset}"
        return (
            f"{budget}, classes of {100 * self.labelled:g} % of the concepts, captions of "
            f"{100 * self.captioned:g} %"
        )

    def run(self, method: str, seed: int, *, data: str, steps: Mapping[str, int] = NO_STEPS) -> Run:
        """Return a method's run; one that sees no annotation is the same at any share.

        UNTRAINED is what M3I's runs of a seed start from, measured with raw pixels. data: digest of
        the data set's manifest, all annotated; steps: of methods that have a number of their own in
        place of the group's budget.
        """
        budget, shares = self.budget, self.shares
        if method in steps:
            budget = f"{steps[method]} steps"
        if method == UNTRAINED:
            budget = "0 steps"
        if method == UNTRAINED or is_label_free(method):
            shares = (1.0, 1.0)
        return Run(
            method=method,
            dataset=self.dataset,
            data=data,
            labelled=shares[0],
            captioned=shares[1],
            seed=seed,
            budget=budget,
            recipe=recipe_digest(method),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a row of the ledger is found by."""

    method: str
    dataset: str
    data: str
    """Digest of the data set's manifest, all annotated: rows of other pictures, or of another
    split, are neither reused nor tabulated."""
    labelled: float
    """Share of the training concepts with a class; 1 where the method sees no annotation."""
    captioned: float
    """Share of those with a caption, drawn apart from the classes."""
    seed: int
    budget: str
    recipe: str
    """Digest of the method's config: rows of an older one are neither reused nor tabulated."""

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Run | None:
        """Return the run of a row; None where the row is of an older recipe.

        Rows of before data sets and shares of captions were told are of FIRST_DATA, with captions
        where there are classes.
        """
        method = figures["method"]
        if not follows_recipe(method, figures.get("recipes", {})):
            return None
        before = {"dataset": "openmoji", "data": FIRST_DATA, "captioned": figures["labelled"]}
        known = {**before, **figures, "recipe": recipe_digest(method)}
        return cls(**{name: known[name] for name in cls.__slots__})

    @property
    def name(self) -> str:
        """Return the name of the run's directory."""
        shares = (f"{share:g}" for share in (self.labelled, self.captioned))
        parts = (self.method, self.dataset, self.data, *shares, str(self.seed))
        return "-".join(
            re.sub(r"[^A-Za-z0-9.]+", "_", part) for part in (*parts, self.budget, self.recipe)
        )

    @property
    def num_steps(self) -> int | None:
        """Return the steps of a budget that is counted in steps, else None."""
        count, is_one, _ = self.budget.partition(" steps")
        return int(count) if is_one else None

    @property
    def seconds(self) -> float | None:
        """Return the seconds of a budget that is a time, else None."""
        return None if self.num_steps is not None else float(self.budget.partition(" s on ")[0])

    @property
    def pace(self) -> Pace:
        """Return what runs share whose steps take equally long."""
        return self.method, self.recipe, self.dataset, self.budget.partition(" on ")[2]

    @property
    def teacher(self) -> Run | None:
        """Return the run that gives this one its frozen encoder, else None."""
        if not config_of(self.method).objective.uses(encoder="frozen"):
            return None
        return replace(self, method=TEACHER, recipe=recipe_digest(TEACHER))


def config_of(method: str, *, data: Path = Path("data/openmoji"), seed: int = 0) -> TrainConfig:
    """Return the demo's config with a method's terms and inputs; UNTRAINED has M3I's."""
    cfg = demo_method(base_of(method), data=data, seed=seed)
    return VARIANTS[method](cfg) if method in VARIANTS else cfg


def base_of(method: str) -> str:
    """Return the method itself, or the one that it is a variant of."""
    base = method.removesuffix(AS_IT_WAS)
    return base if base in METHODS else OURS


def is_label_free(method: str) -> bool:
    """Return whether no term of a method, nor of its teacher, sees a class or a caption.

    Data sets of any shares hold the same pictures in the same order, so that such a run is the same
    to the bit with each of them: it is trained once, on the whole set.
    """
    objective = config_of(method).objective
    return not any(
        term.is_annotation or term.encoder == "frozen" for term in objective.active_terms
    )


def recipes_of(method: str) -> dict[str, TrainConfig]:
    """Return the configs behind a method's rows, by name: its own, and that of its teacher.

    They are the same whatever a run's data, seed, shares and length.
    """
    cfg = config_of(method)
    teachers = {TEACHER: config_of(TEACHER)} if cfg.objective.uses(encoder="frozen") else {}
    return {method: cfg} | teachers


def recipe_trees(method: str) -> dict[str, Any]:
    """Return `recipes_of` as JSON's objects, which rows and step times keep."""
    return {name: to_tree(cfg) for name, cfg in recipes_of(method).items()}


def recipe_digest(method: str) -> str:
    """Return eight hex digits of `recipes_of`, which name the directory of a run."""
    return hashlib.sha256(json.dumps(recipe_trees(method)).encode()).hexdigest()[:8]


def follows_recipe(method: str, trees: Mapping[str, Any]) -> bool:
    """Return whether `trees`, once written by `recipe_trees`, are the method's configs of today.

    They are compared field by field. A field that there was not yet has the value that the reader
    of an old config.json gives it; what can no longer be read is another recipe.
    """
    try:
        then = {name: TrainConfig.from_tree(tree, Path(name)) for name, tree in trees.items()}
    except ValueError:
        return False
    return then == recipes_of(method)
