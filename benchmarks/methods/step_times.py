"""The time of a step of each of the pilot's arms: measured once, committed, the same for everybody.

`m3i-fast bench methods --pilot --calibrate` on a machine that does nothing else writes it. All
machines then train an arm for the same number of steps, so that their rows can be put together.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from m3i_fast.benchmarks.ledger.rows import make_row
from m3i_fast.durable_files import write_atomically
from m3i_fast.json_files import read_json

FILE = Path(__file__).with_name("step_times.json")
COMMAND = "m3i-fast bench methods --pilot --calibrate"
ROUNDS = 3  # of all arms in turn, so that a busy neighbour meets all alike; the median counts

_ARM = {"recipe": str, "step_ms": float, "rounds_ms": [float]}
_SHAPE = {"figures": {"num_threads": int, "arms": {str: _ARM}}}


@dataclass(frozen=True, slots=True)
class StepTime:
    recipe: str
    """Digest of the arm's config."""
    step_ms: float


def read_step_times() -> dict[str, StepTime]:
    """Arm -> time of a step, as committed; none before the first. ValueError of a damaged file."""
    if not FILE.is_file():
        return {}
    arms = read_json(FILE, _SHAPE)["figures"]["arms"]
    return {name: StepTime(arm["recipe"], arm["step_ms"]) for name, arm in arms.items()}


def step_counts(
    arms: Sequence[str], digest: Callable[[str], str], seconds: float
) -> dict[str, int]:
    """Arm -> steps that take so many seconds by the committed times.

    digest: of an arm's config. Raises ValueError where an arm's was not timed as it is today.
    """
    times = read_step_times()
    for name in arms:
        found = times[name].recipe if name in times else "none"
        if found != digest(name):
            raise ValueError(
                f"{FILE}: expected the time of a step of {name} with recipe {digest(name)}, got "
                f"{found}; on a machine that does nothing else type {COMMAND}"
            )
    return {name: max(round(1000 * seconds / times[name].step_ms), 1) for name in arms}


def write_step_times(
    rounds: Mapping[str, Sequence[float]],  # arm -> seconds of a step, one a round
    digest: Callable[[str], str],
    *,
    num_threads: int,
    jobs: int,
    dataset: str,
) -> None:
    """Replace the file; beside the times stand the machine, its load, the commit, the command."""
    arms = {
        name: {
            "recipe": digest(name),
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
    write_atomically(FILE, (json.dumps(row, indent=2) + "\n").encode())
