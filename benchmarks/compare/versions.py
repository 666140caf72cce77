"""Samples of two versions of the package, taken in turns by fresh processes on this machine."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3i_fast import op_registry
from m3i_fast.benchmarks.compare import worker

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
# A sample's calls are a multiple of this many, so that a planted tenth is whole calls.
CALLS_STEP = 10
WARM_UP_STEPS = 2
STEP_WORK = Path(worker.__file__).with_name("step_work.py")


@dataclass(frozen=True, slots=True)
class Steps:
    """What both versions train on."""

    batch: Path
    """Fields of a batch, as torch.save writes them."""
    curve: int
    """The first steps, whose losses a process of each version says."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How many samples are taken, and how long they last."""

    work: str
    pairs: int = 6
    """Pairs of processes."""
    samples: int = 80
    """Of each process."""
    sample_ms: float = 5.0
    """What a sample lasts at least."""
    threads: int = 1
    steps: Steps | None = None
    """`work` is a recipe, a sample one step of it; None: an op."""


@dataclass(frozen=True, slots=True)
class Version:
    """The version of the package that a process runs."""

    name: str = "this version"
    commit: str = ""
    """Of another version."""
    site: Path | None = None
    """Folder of its package; None: the one that runs this."""
    planted: float = 0.0
    """Share of the work that is done again."""


Groups = list[list[float]]
Said = dict[str, Any]
"""What a process says of itself when it is warm."""


def sample_in_turns(
    plan: Plan,
    versions: Sequence[Version],
    *,
    check: Callable[[list[Said]], object] | None = None,
    between: Callable[[], object] | None = None,
) -> list[Groups]:
    """Return milliseconds a call: a list for each version, in it one for each of its processes.

    As many processes start at once as there are cores for their threads, and measuring begins when
    the last is warm. Then one works at a time: every round takes a sample of each, the versions
    side by side and taking turns at going first. check: called with what the first process of each
    version said, before any sample; between: called once a round, while no process works.
    """
    with ExitStack() as stack:
        started: list[Worker] = []
        said: list[Said] = []
        at_once = max(1, len(os.sched_getaffinity(0)) // plan.threads)
        for number in range(plan.pairs):
            for version in versions:
                started.append(stack.enter_context(Worker(plan, version, number)))
                if len(started) - len(said) == at_once:
                    said += [each.wait_until_warm() for each in started[len(said) :]]
        said += [each.wait_until_warm() for each in started[len(said) :]]
        size = len(versions)
        if check:
            check(said[:size])
        calls = 1 if plan.steps else _calls(plan.sample_ms, [each["ms"] for each in said])
        workers = [started[begin : begin + size] for begin in range(0, len(started), size)]
        groups: list[Groups] = [[[] for _ in workers] for _ in versions]
        order = list(range(len(versions)))
        for index in range(plan.samples):
            if between:
                between()
            for number, pair in enumerate(workers):
                turn = order if (index + number) % 2 else order[::-1]
                for which in turn:
                    groups[which][number].append(pair[which].sample(calls))
    return groups


def _calls(sample_ms: float, call_ms: Sequence[float]) -> int:
    """Return how many calls of the fastest process last as long as a sample has to."""
    return CALLS_STEP * max(1, -(-int(sample_ms / min(call_ms)) // CALLS_STEP))


class Worker:
    """A process of worker.py; a context manager that ends it.

    number: among those of its version; of steps the first one takes the whole curve.
    """

    def __init__(self, plan: Plan, version: Version, number: int = 0) -> None:
        self._version, self._warm = version, plan.steps is None
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads could fill
        registry = STEP_WORK if plan.steps else op_registry.__file__
        command = [sys.executable, worker.__file__, plan.work, "--registry", str(registry)]
        command += ["--threads", str(plan.threads)]
        if plan.steps:
            first = WARM_UP_STEPS if number else plan.steps.curve
            command += ["--batch", str(plan.steps.batch), "--first", str(first)]
        if version.site:
            command += ["--site", str(version.site)]
        threads = {"OMP_NUM_THREADS": str(plan.threads), "MKL_NUM_THREADS": str(plan.threads)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **threads},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def wait_until_warm(self) -> Said:
        """Return what the process says of itself: milliseconds of a call, roughly, as `ms`.

        Of steps also what `step_work.prepare` gives. Raises ValueError with what the version lacks,
        RuntimeError where not this version was loaded, or where the process ended, with its last
        line.
        """
        said = self._answer()
        if "missing" in said:
            raise ValueError(f"{self._version.name}: {said['missing']}")
        where = Path(said["ops"]).resolve()
        if self._version.site and not where.is_relative_to(self._version.site.resolve()):
            raise RuntimeError(f"expected the package of {self._version.site}, got {where}")
        return said

    def sample(self, calls: int) -> float:
        """Return milliseconds a call, over so many calls and the planted ones.

        A call of an op before them is not timed; a step is too long to need one.
        """
        extra = round(self._version.planted * calls)
        asked = {"calls": calls, "extra": extra, "warm": self._warm}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["ms"])

    def _answer(self) -> Said:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            answer: Said = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        status = f"exit status {self._process.returncode}"
        last = self._errors.read().strip().splitlines()[-1:] or [status]
        raise RuntimeError(f"a process of {self._version.name} ended: {last[0]}")


# ---- Another commit ------------------------------------------------------------------------------


@contextmanager
def built(ref: str) -> Iterator[Version]:
    """Build the package of another commit, and give that version, which is removed afterwards.

    A git worktree in a temporary folder, compiled by the build of its own pyproject.toml against
    the torch that is installed. ValueError for what is no commit, RuntimeError with the compiler's
    last lines.
    """
    commit = _git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", what=f"--against {ref}")
    with tempfile.TemporaryDirectory(prefix="m3i-fast-compare-") as folder:
        source, site = Path(folder) / "source", Path(folder) / "site"
        _git("worktree", "add", "--detach", "--quiet", str(source), commit, what="git worktree")
        try:
            logger.info("building %s (%s)", ref, commit[:12])
            _build(source, site, Path(folder) / "build")
            yield Version(ref, commit, site)
        finally:
            _git("worktree", "remove", "--force", str(source), what="git worktree")


def _git(*arguments: str, what: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "no such commit"
        raise ValueError(f"{what}: expected a commit of this checkout, got {reason}")
    return done.stdout.strip()


def _build(source: Path, site: Path, build: Path) -> None:
    cuda = "ON" if torch.version.cuda else "OFF"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--target", str(site)),
            f"--config-settings=build-dir={build}",
            f"--config-settings=cmake.define.M3I_CUDA={cuda}",
            str(source),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": tools},
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise RuntimeError(f"{source.name} does not build:\n{last}")
