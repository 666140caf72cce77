"""How far a run is, as its directory says: going on, complete, or ended before its end.

Reads only, so that it can be asked of a run that trains. Loads no model.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m3i_fast.engine.run.lock import NAME

STACKS, DUMPS = "stacks-rank*.txt", "dump_step_*"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """How far a run is."""

    state: Literal["training", "complete", "ended"]
    step: int
    """Steps that it has taken, as its log and its checkpoints say."""
    num_steps: int
    saved_step: int | None
    """Step of its newest checkpoint; None without one."""
    traces: Sequence[str] = ()
    """Files that a run leaves where it hangs or fails."""
    seconds_since: float = 0.0
    """Time since its last logged row."""

    @property
    def sentences(self) -> list[str]:
        """Return it in words."""
        of = f"step {self.step:,} of {self.num_steps:,}"
        saved = "no checkpoint" if self.saved_step is None else f"checkpoint {self.saved_step:,}"
        if self.state == "complete":
            return [f"The run is complete, {self.num_steps:,} steps."]
        if self.state == "training":
            return [
                f"The run is training now, at {of}; newest is {saved}, the last row was logged "
                f"{self.seconds_since:,.0f} s ago."
            ]
        told = [
            f"The run ended before its end, at {of}: it was stopped, or it failed. Newest is "
            f"{saved}; --resume goes on from there."
        ]
        if self.traces:
            told.append(f"It left {', '.join(self.traces)}, which say what went wrong.")
        return told


def status_of(run: Path, *, num_steps: int, logged_step: int, saved_step: int | None) -> RunStatus:
    """Return how far a run of `num_steps` is, whose log and checkpoints end at these steps."""
    step = max(logged_step, saved_step or 0)
    log = run / "metrics.jsonl"
    is_done = saved_step is not None and saved_step >= num_steps
    return RunStatus(
        state="complete" if is_done else "training" if is_locked(run) else "ended",
        step=step,
        num_steps=num_steps,
        saved_step=saved_step,
        traces=sorted(path.name for of in (STACKS, DUMPS) for path in run.glob(of)),
        seconds_since=max(time.time() - log.stat().st_mtime, 0.0) if log.exists() else 0.0,
    )


def is_locked(run: Path) -> bool:
    """Return whether a process trains in the directory now, without holding its lock afterwards.

    False on file systems without locks, where it cannot be told.
    """
    try:
        descriptor = os.open(run / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)  # releases the lock
    return False
