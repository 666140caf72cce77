"""Steps of `make gpu`: a command, what it may take, and how it ended."""

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
    name: str
    """Also of the file that keeps its output."""
    command: tuple[str, ...]
    limit_s: float
    cwd: Path = ROOT
    missing: str | None = None
    """What it needs and is not here: it is left out, and that is no failure."""
    quiet: bool = False
    """Megabytes: its output goes to its file alone."""
    is_benchmark: bool = False
    """Shares the time of --minutes with the others."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    name: str
    outcome: str
    """passed, or why not."""
    seconds: float
    has_failed: bool = False
    command: str = ""


class Runner:
    """Runs steps one after another; all they print is shown, logged and kept in a file each."""

    def __init__(self, out: Path, environment: dict[str, str], *, benchmark_s: float) -> None:
        self.out, self.results = out, list[Result]()
        self._environment = {**os.environ, **environment}
        self._left_s = benchmark_s
        self._log = (out / "log.txt").open("w")

    def __call__(self, step: Step) -> Result:
        result = self._run(step)
        if step.is_benchmark:
            self._left_s -= result.seconds
        self.results.append(result)
        self.say(f"  {step.name}: {result.outcome}, {result.seconds:.0f} s\n")
        return result

    def fail(self, name: str, reason: str) -> None:
        self.say(f"{reason}\n")
        first = reason.splitlines()[0]
        self.results.append(Result(name=name, outcome=first, seconds=0.0, has_failed=True))

    def say(self, text: str) -> None:
        for stream in (self._log, sys.stdout):
            stream.write(text)
            stream.flush()

    def close(self) -> None:
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
        """Exit status, and whether it ended by itself; its children are stopped with it."""
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
