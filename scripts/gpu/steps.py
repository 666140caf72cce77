"""Steps of `make gpu`: commands with a time limit, their runner, and their results.

The results are kept in the folder, so that a second start repeats only what has not passed with the
same build.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TextIO

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a step finds out, beside what was expected of it."""

    what: str
    expected: str
    got: str
    holds: bool | None
    """None: a prediction or a figure to look at, which is neither right nor wrong."""
    kind: Literal["must", "note"] = "must"
    """must: the step fails if the check does not hold. note: the step passes."""
    source: str = ""
    """Where the expectation comes from."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command to run, with its time limit in seconds."""

    name: str
    """Stem of the file with its output, too."""
    command: tuple[str, ...]
    limit_s: float
    answers: str = ""
    """The question that the step answers."""
    expects: str = ""
    """What it is expected to end with, in words."""
    read: Callable[[Path, str], Sequence[Check]] | None = None
    """Returns what the step found, from the folder of the results and the step's output."""
    passing: tuple[int, ...] = (0,)
    """Exit statuses of a step that has done its work."""
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
    checks: tuple[Check, ...] = ()
    has_passed: bool = False
    """Whether it ran to its end and every `must` check holds."""
    build: str = ""
    """Digest of the compiled modules that it ran with."""
    is_earlier: bool = False
    """Whether an earlier start ran it."""

    @property
    def surprises(self) -> list[Check]:
        """Return the checks that do not hold and do not fail the step."""
        return [c for c in self.checks if c.holds is False and c.kind == "note"]


class Runner:
    """A runner of steps, which prints and logs their output and keeps a file of each.

    again: repeat steps that passed at an earlier start in the same folder.
    after_each: called with the runner after each step, as to write a page.
    """

    build = ""
    """Digest of the compiled modules, which is known once they are built."""

    def __init__(
        self,
        out: Path,
        environment: dict[str, str],
        *,
        benchmark_s: float,
        again: bool = False,
        after_each: Callable[[Runner], None] | None = None,
    ) -> None:
        self.out, self.results = out, list[Result]()
        self._environment = {**os.environ, **environment}
        self._left_s = benchmark_s
        self._after_each = after_each
        self._earlier = {} if again else read_results(out)
        self._log = (out / "log.txt").open("a")

    def __call__(self, step: Step, *, always: bool = False) -> Result:
        """Run a step, or leave it out where a requirement or time is missing.

        A step that passed at an earlier start, as the same command with the same build, is not
        repeated unless always.
        """
        earlier, command = self._earlier.get(step.name), shlex.join(step.command)
        is_same = earlier is not None and (earlier.build, earlier.command) == (self.build, command)
        if earlier is not None and earlier.has_passed and is_same and not always:
            self._keep(earlier)
            return earlier
        result = self._run(step)
        if step.is_benchmark:
            self._left_s -= result.seconds
        self._keep(result)
        return result

    def fail(self, name: str, reason: str) -> None:
        """Record a failure outside of a step; the outcome is the first line of the reason."""
        self.say(f"{reason}\n")
        first = reason.splitlines()[0]
        self._keep(Result(name=name, outcome=first, seconds=0.0, has_failed=True))

    def say(self, text: str) -> None:
        """Print and log a text."""
        for stream in (self._log, sys.stdout):
            stream.write(text)
            stream.flush()

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def _keep(self, result: Result) -> None:
        """Add a result to those of the folder; of steps that are yet to come the earlier remain."""
        self.results.append(result)
        earlier = " at an earlier start" if result.is_earlier else ""
        self.say(f"  {result.name}: {result.outcome}{earlier}, {result.seconds:.0f} s\n")
        done = {each.name for each in self.results}
        waiting = [each for name, each in self._earlier.items() if name not in done]
        write_results(self.out, [*self.results, *waiting])
        if self._after_each is not None:
            self._after_each(self)

    def _run(self, step: Step) -> Result:
        if step.missing is not None:
            return Result(name=step.name, outcome=f"left out: {step.missing}", seconds=0.0)
        limit = min(step.limit_s, self._left_s) if step.is_benchmark else step.limit_s
        if limit <= 0:
            reason = "left out: the time of --minutes is used up"
            return Result(name=step.name, outcome=reason, seconds=0.0)
        command, begun = shlex.join(step.command), time.monotonic()
        self.say(f"+ {command}\n")
        kept = self.out / f"{step.name}.txt"
        with kept.open("w") as output:
            status, in_time = self._child(step, limit, output)
        seconds = time.monotonic() - begun
        checks = self._read(step, kept.read_text())
        failing = [check.kind for check in checks if check.holds is False]
        outcome = f"{len(failing)} of {len(checks)} not as expected" if failing else "passed"
        if wrong := failing.count("must"):
            outcome = f"{wrong} of {len(checks)} wrong"
        if status not in step.passing:
            outcome = f"failed with exit status {status}"
        if not in_time:
            outcome = f"stopped after {limit:.0f} s"
        has_passed = in_time and status in step.passing and not wrong
        return Result(
            name=step.name,
            outcome=outcome,
            seconds=seconds,
            has_failed=not has_passed,
            command=command,
            checks=checks,
            has_passed=has_passed,
            build=self.build,
        )

    def _read(self, step: Step, output: str) -> tuple[Check, ...]:
        """Return what the step found; an output that cannot be read is a check that fails."""
        if step.read is None:
            return ()
        try:
            return tuple(step.read(self.out, output))
        except Exception as error:  # a step that fails can have left anything behind
            got = f"{type(error).__name__}: {error}"
            return (Check(what="output", expected="readable", got=got, holds=False),)

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


# ---- Results of a folder -------------------------------------------------------------------------


def write_results(out: Path, results: Sequence[Result]) -> None:
    """Write the results into the folder, at once: a start that is cut off leaves the former."""
    beside = out / "results.json.new"
    beside.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    beside.replace(out / "results.json")


def read_results(out: Path) -> dict[str, Result]:
    """Return the results that an earlier start left in the folder, by step; none without one."""
    path = out / "results.json"
    if not path.is_file():
        return {}
    found = {}
    for fields in json.loads(path.read_text()):
        checks = tuple(Check(**check) for check in fields.pop("checks"))
        found[fields["name"]] = Result(**{**fields, "checks": checks, "is_earlier": True})
    return found
