"""Steps of `make gpu`: commands with a time limit, their runner, and their results."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command to run, with its time limit in seconds."""

    name: str
    """Stem of the file with its output, too."""
    command: tuple[str, ...]
    limit_s: float
    cwd: Path = ROOT
    missing: str | None = None
    """Requirement that is missing, for which the step is left out without failing."""
    quiet: bool = False
    """Write the output to its file only, since it takes megabytes."""
    is_benchmark: bool = False
    """Share the time of --minutes with the other benchmarks."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a step."""

    name: str
    outcome: str
    """passed, or why it did not pass."""
    seconds: float
    has_failed: bool = False
    command: str = ""


class Runner:
    """A runner of steps, which prints and logs their output and keeps a file of each."""

    def __init__(self, out: Path, environment: dict[str, str], *, benchmark_s: float) -> None:
        self.out, self.results = out, list[Result]()
        self._environment = {**os.environ, **environment}
        self._left_s = benchmark_s
        self._log = (out / "log.txt").open("w")

    def __call__(self, step: Step) -> Result:
        """Run a step, or leave it out where a requirement or time is missing."""
        result = self._run(step)
        if step.is_benchmark:
            self._left_s -= result.seconds
        self.results.append(result)
        self.say(f"  {step.name}: {result.outcome}, {result.seconds:.0f} s\n")
        return result

    def fail(self, name: str, reason: str) -> None:
        """Record a failure outside of a step; the outcome is the first line of the reason."""
        self.say(f"{reason}\n")
        first = reason.splitlines()[0]
        self.results.append(Result(name=name, outcome=first, seconds=0.0, has_failed=True))

    def say(self, text: str) -> None:
        """Print and log a text."""
        for stream in (self._log, sys.stdout):
            stream.write(text)
            stream.flush()

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def _run(self, step: Step) -> Result:
        if step.missing is not None:
            return Result(name=step.name, outcome=f"left out: {step.missing}", seconds=0.0)
        limit = min(step.limit_s, self._left_s) if step.is_benchmark else step.limit_s
        if limit <= 0:
            reason = "left out: the time of --minutes is used up"
            return Result(name=step.name, outcome=reason, seconds=0.0)
        command, begun = shlex.join(step.command), time.monotonic()
        self.say(f"+ {command}\n")
        with (self.out / f"{step.name}.txt").open("w") as kept:
            status, in_time = self._child(step, limit, kept)
        seconds = time.monotonic() - begun
        outcome = "passed" if status == 0 else f"failed with exit status {status}"
        if not in_time:
            outcome = f"stopped after {limit:.0f} s"
        return Result(
            name=step.name,
            outcome=outcome,
            seconds=seconds,
            has_failed=status != 0 or not in_time,
            command=command,
        )

    def _child(self, step: Step, limit: float, kept: TextIO) -> tuple[int, bool]:
        """Run the command; returns its exit status and whether it ended within the limit.

        A command over the limit is killed with its children.
        """
        try:
            child = subprocess.Popen(
                step.command,
                cwd=step.cwd,
                env={**self._environment, **step.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            self.say(f"{error}\n")
            return 127, True
        late = threading.Event()

        def stop() -> None:
            late.set()
            os.killpg(child.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            with child:
                assert child.stdout
                for line in child.stdout:
                    kept.write(line)
                    if not step.quiet:
                        self.say(line)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        return child.returncode, not late.is_set()
