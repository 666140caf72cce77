"""The plan of the experiment, a file that is committed before the first counted run.

`plans/NAME.json` says what is compared, on what, for how long, by which measure and rule;
`plans/NAME_step_times.json`, its own or that of a plan before it, how long a step of each method
takes, from which steps follow. Rows keep the digest of both. What is in the files cannot be changed
by a flag, and once there is a counted row the files cannot be changed either: another plan has
another name.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

from m3i_fast.benchmarks.ledger.rows import make_row
from m3i_fast.benchmarks.one_stage.arms import (
    ARMS,
    Stage,
    Tuning,
    follows_recipe,
    has_label_weight,
    recipe_tree,
)
from m3i_fast.benchmarks.one_stage.resampling import CONFIDENCE, NUM_DRAWS
from m3i_fast.benchmarks.one_stage.verdict import MARGIN
from m3i_fast.config.convert import from_tree
from m3i_fast.durable_files import write_atomically
from m3i_fast.json_files import read_json

FOLDER = Path(__file__).parent / "plans"
SetName = Literal["styles", "earth"]
NUM_CLASSES: Mapping[SetName, int] = {"styles": 9, "earth": 17}
BASELINES = "baselines"
"""In place of an arm: the untrained encoder and raw pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningGrid:
    """What each arm is tried with, and how these runs are measured."""

    seconds: float
    share: float
    """Of the training concepts or blocks of fold 0: left out of these runs, which are measured by
    them."""
    seed: int
    num_seeds: int = 1
    """From `seed` on; a setting is chosen by its mean over them."""
    lr: tuple[float, ...]
    label_weight: tuple[float, ...]
    """Only for arms of which some terms see annotations and others do not."""
    measure: dict[SetName, str]

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    def settings(self, arm: str) -> list[Tuning]:
        weights = self.label_weight if has_label_weight(arm) else (1.0,)
        return [Tuning(lr=lr, label_weight=each) for lr, each in product(self.lr, weights)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """When a difference is claimed, and when it is ruled out: what `verdict` does."""

    level: float = CONFIDENCE
    """Of the two-sided intervals."""
    margin: float = MARGIN
    """In points; the claim is refuted where the upper bound is below it on each set."""
    draws: int = NUM_DRAWS
    """Of the arms' means, by which the intervals are made."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The file as it is; see `plans/first.json`."""

    name: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    heldout: float
    """Share of concepts or blocks that a seed holds out: seed s holds out fold s, and round."""
    labelled: float
    captioned: float
    annotated_only: bool = False
    """Whether stages that learn from annotations alone read only the pictures that have one."""
    seconds: float
    """Training time of a run, all of its stages, by the committed step times on one core."""
    primary: dict[SetName, str]
    """The measure that decides, by set."""
    step_times: str = ""
    """The plan whose committed times of a step count here, too; empty: this one."""
    tuning: TuningGrid
    tuned: dict[SetName, dict[str, Tuning]]
    """Set -> arm -> what was chosen by `tuning`; empty before that."""
    data: dict[str, str]
    """Folder of each data set that a run reads -> SHA-256 of its manifest."""
    rule: Rule

    def __post_init__(self) -> None:
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"{self.name}.arms: expected some of {', '.join(ARMS)}, got {unknown}")
        if unknown := [name for name in self.primary if name not in NUM_CLASSES]:
            raise ValueError(f"{self.name}.primary: expected styles and earth, got {unknown}")
        if self.rule != Rule():
            raise ValueError(f"{self.name}.rule: expected {Rule()}, got {self.rule}")

    @property
    def title(self) -> str:
        return (
            f"{self.seconds:g} s a run, classes of {100 * self.labelled:g} %, captions of "
            f"{100 * self.captioned:g} %"
        )

    @property
    def num_folds(self) -> int:
        return int(1 / self.heldout + 1e-9)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.json"

    @property
    def step_times_path(self) -> Path:
        return FOLDER / f"{self.step_times or self.name}_step_times.json"

    @cached_property
    def digest(self) -> str:
        """Return the SHA-256 of both files' bytes."""
        content = self.path.read_bytes() + self.step_times_path.read_bytes()
        return hashlib.sha256(content).hexdigest()

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the methods that a stage of an arm trains, each once."""
        return tuple(dict.fromkeys(stage.method for arm in self.arms for stage in ARMS[arm]))

    def tuning_runs(self) -> Iterator[Run]:
        """Yield the runs that settings are chosen by, seed by seed, so that what ran is paired."""
        for seed, name, arm in product(self.tuning.seeds, self.primary, self.arms):
            for tuning in self.tuning.settings(arm):
                yield Run(data_set=name, arm=arm, seed=seed, tuning=tuning, is_counted=False)

    def counted_runs(self) -> Iterator[Run]:
        """Yield the runs that count, seed by seed, so that what has run is paired."""
        for seed, name in product(self.seeds, self.primary):
            for arm in (*self.arms, BASELINES):
                tuning = Tuning() if arm == BASELINES else self.tuned[name][arm]
                yield Run(data_set=name, arm=arm, seed=seed, tuning=tuning, is_counted=True)

    def fold(self, run: Run) -> int:
        return run.seed % self.num_folds if run.is_counted else 0

    def stage_folder(self, run: Run, stage: Stage) -> str:
        """Return the data set that a stage of a run trains on."""
        only = self.annotated_only and stage.needs_annotation
        return self.folder(run, is_whole=False) + "-annotated" * only

    def folder(self, run: Run, *, is_whole: bool) -> str:
        """Return the data set of a run's fold, partly annotated or with all annotations."""
        parts: list[str] = [run.data_set, f"fold-{self.fold(run)}"]
        if not run.is_counted:
            parts.append("tune")
        if not is_whole:
            parts.append(f"labelled-{self.labelled:g}-captioned-{self.captioned:g}")
        return "-".join(parts)

    def steps(self, run: Run) -> tuple[int, ...]:
        """Return the steps of each stage of a run, by the committed times."""
        seconds = self.seconds if run.is_counted else self.tuning.seconds
        times = self._step_ms[run.data_set]
        return tuple(
            max(round(1000 * seconds * stage.share / times[stage.method]), 1)
            for stage in ARMS.get(run.arm, ())  # baselines have none
        )

    @cached_property
    def _step_ms(self) -> dict[SetName, dict[str, float]]:
        """Read the committed times. Raises ValueError for one missing, or of another recipe."""
        entry = {"step_ms": float, "rounds_ms": [float], "recipe": dict}
        path = self.step_times_path
        if not path.is_file():
            raise ValueError(f"{path}: expected step times, got no file; {self._calibration}")
        times = read_json(path, {"figures": {"sets": {str: {str: entry}}}})["figures"]["sets"]
        for name, method in product(self.primary, self.methods):
            stage, found = Stage(method), times.get(name, {}).get(method)
            if found is None or not follows_recipe(stage, NUM_CLASSES[name], found["recipe"]):
                raise ValueError(
                    f"{path}: expected the time of a step of {method} on {name} with today's "
                    f"recipe, got {'none' if found is None else 'that of another recipe'}; "
                    f"{self._calibration}"
                )
        return {name: {m: t["step_ms"] for m, t in of.items()} for name, of in times.items()}

    @property
    def _calibration(self) -> str:
        return (
            "on a machine that does nothing else type m3i-fast bench one-stage --plan "
            f"{self.step_times or self.name} --calibrate"
        )

    def write_step_times(
        self, rounds: Mapping[SetName, Mapping[str, Sequence[float]]], *, jobs: int
    ) -> Path:
        """Replace the file of step times; rounds: set -> method -> seconds of a step, several."""
        sets = {
            name: {
                method: {
                    "step_ms": round(1000 * statistics.median(seconds), 2),
                    "rounds_ms": [round(1000 * each, 2) for each in seconds],
                    "recipe": recipe_tree(Stage(method), NUM_CLASSES[name]),
                }
                for method, seconds in of.items()
            }
            for name, of in rounds.items()
        }
        load = round(os.getloadavg()[0], 2)  # of the last minute: `jobs` where nothing else ran
        row = make_row("one_stage_step_times", {"jobs": jobs, "load": load, "sets": sets})
        write_atomically(self.step_times_path, (json.dumps(row, indent=1) + "\n").encode())
        return self.step_times_path

    def expect_committed(self) -> None:
        """Raise ValueError unless both files are what the checkout's last commit has."""
        for path in (self.path, self.step_times_path):
            shown = subprocess.run(
                ["git", "show", f"HEAD:./{path.name}"], cwd=FOLDER, capture_output=True, check=False
            )
            if shown.returncode or shown.stdout != path.read_bytes():
                raise ValueError(
                    f"{path}: expected the plan as it is committed, got "
                    f"{'a changed one' if not shown.returncode else 'one that is not committed'}; "
                    "commit it before the first counted run, and give a changed plan another name"
                )

    def expect_tuned(self) -> None:
        """Raise ValueError unless every arm has its settings."""
        for name, arm in product(self.primary, self.arms):
            if self.tuned.get(name, {}).get(arm) not in self.tuning.settings(arm):
                raise ValueError(
                    f"{self.path}: expected in tuned.{name} a setting of {arm} that was tried, got "
                    f"{self.tuned.get(name, {}).get(arm)}; type m3i-fast bench one-stage --plan "
                    f"{self.name} --tune, which prints what to write there"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a row of a plan is found by."""

    data_set: SetName
    arm: str
    seed: int
    tuning: Tuning
    is_counted: bool

    @property
    def name(self) -> str:
        """Return the name of the run's directory."""
        kind = "counted" if self.is_counted else "tuning"
        arm = self.arm.replace(" + ", "+").replace(" ", "_")
        factors = f"lr-{self.tuning.lr:g}-labels-{self.tuning.label_weight:g}"
        return f"{kind}-{self.data_set}-{arm}-{factors}-{self.seed}"

    @property
    def num_classes(self) -> int:
        return NUM_CLASSES[self.data_set]


def read_plan(name: str) -> Plan:
    """Read plans/NAME.json. Raises FileNotFoundError or ValueError naming the file and field."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json") if "_step_" not in p.name))
        raise FileNotFoundError(f"plan: expected one of {known}, got {name}")
    tree = json.loads(path.read_text())
    return from_tree(Plan, {**tree, "name": name}, str(path))
