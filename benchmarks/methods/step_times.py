"""The time of a step of each arm of a plan: measured once, committed, the same for everybody.

`m3i-fast bench methods --pilot --calibrate` on a machine that does nothing else writes that of the
pilot. All machines then train an arm for the same number of steps, so that their rows can be put
together.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.ledger.rows import make_row
from m3i_fast.benchmarks.methods.plan import Plan, follows_recipe, recipe_trees
from m3i_fast.durable_files import write_atomically
from m3i_fast.json_files import read_json

FOLDER = Path(__file__).parent
ROUNDS = 3  # of all arms in turn, so that a busy neighbour meets all alike; the median counts

_ARM = {"recipes": {str: dict}, "step_ms": float, "rounds_ms": [float]}
_SHAPE = {"figures": {"num_threads": int, "arms": {str: _ARM}}}


@dataclass(frozen=True, slots=True)
class StepTime:
    recipes: dict[str, Any]
    """The arm's configs as JSON's objects, as of `recipe_trees`."""
    step_ms: float


def step_times_file(plan: Plan) -> Path:
    """Return where the step times of a plan's arms are committed."""
    return FOLDER / f"step_times_{plan}.json"


def read_step_times(plan: Plan) -> dict[str, StepTime]:
    """Return each arm's committed time of a step. Raises ValueError for a damaged file."""
    path = step_times_file(plan)
    if not path.is_file():
        return {}
    arms = read_json(path, _SHAPE)["figures"]["arms"]
    return {name: StepTime(arm["recipes"], arm["step_ms"]) for name, arm in arms.items()}


def step_counts(plan: Plan, arms: Sequence[str], seconds: float) -> dict[str, int]:
    """Return how many steps of each arm take so many seconds by the committed times.

    Raises ValueError where an arm was not timed, or with another recipe than today's.
    """
    times = read_step_times(plan)
    for name in arms:
        if name not in times or not follows_recipe(name, times[name].recipes):
            got = "that of another recipe" if name in times else "none"
            raise ValueError(
                f"{step_times_file(plan)}: expected the time of a step of {name} with today's "
                f"recipe, got {got}; on a machine that does nothing else type "
                f"m3i-fast bench methods --{plan} --calibrate"
            )
    return {name: max(round(1000 * seconds / times[name].step_ms), 1) for name in arms}


def write_step_times(
    plan: Plan,
    rounds: Mapping[str, Sequence[float]],  # arm -> seconds of a step, one a round
    *,
    num_threads: int,
    jobs: int,
    dataset: str,
) -> Path:
    """Replace the plan's file, and return its path.

    Beside the times stand the machine, its load, the commit and the command.
    """
    arms = {
        name: {
            "recipes": recipe_trees(name),
            "step_ms": round(1000 * statistics.median(seconds), 2),
            "rounds_ms": [round(1000 * each, 2) for each in seconds],
        }
        for name, seconds in rounds.items()
    }
    figures = {
        "num_threads": num_threads,
        "jobs": jobs,
        "dataset": dataset,
        "load": round(os.getloadavg()[0], 2),  # of the last minute: `jobs` where nothing else ran
        "arms": arms,
    }
    row = make_row("methods_step_times", figures)
    path = step_times_file(plan)
    write_atomically(path, (json.dumps(row, indent=2) + "\n").encode())
    return path
