"""Samples of two versions of the package, taken in turns by fresh processes on this machine."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True, slots=True)
class Version:
    """The version of the package that a process runs."""

    site: Path | None = None
    """Folder of its package; None: the one that runs this."""
    planted: float = 0.0
    """Share of the work that is done again."""


Groups = list[list[float]]


def sample_in_turns(plan: Plan, versions: Sequence[Version]) -> list[Groups]:
    """Return milliseconds a call: a list for each version, in it one for each of its processes.

    All processes start at once, and measuring begins when the last is warm. Then one works at a
    time: every round takes a sample of each, the versions side by side and taking turns at going
    first.
    """
    with ExitStack() as stack:
        workers = [
            [stack.enter_context(Worker(plan, version)) for version in versions]
            for _ in range(plan.pairs)
        ]
        slowest = [worker.wait_until_warm() for pair in workers for worker in pair]
        calls = CALLS_STEP * max(1, -(-int(plan.sample_ms / min(slowest)) // CALLS_STEP))
        groups: list[Groups] = [[[] for _ in workers] for _ in versions]
        order = list(range(len(versions)))
        for index in range(plan.samples):
            for number, pair in enumerate(workers):
                turn = order if (index + number) % 2 else order[::-1]
                for which in turn:
                    groups[which][number].append(pair[which].sample(calls))
    return groups


class Worker:
    """A process of worker.py; a context manager that ends it."""

    def __init__(self, plan: Plan, version: Version) -> None:
        self._version = version
        self._errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads could fill
        command = [sys.executable, worker.__file__, plan.work, "--registry", op_registry.__file__]
        command += ["--threads", str(plan.threads)]
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

    def wait_until_warm(self) -> float:
        """Milliseconds of a call, roughly. RuntimeError where not this version was loaded."""
        said = self._answer()
        where = Path(said["ops"]).resolve()
        if self._version.site and not where.is_relative_to(self._version.site.resolve()):
            raise RuntimeError(f"expected the package of {self._version.site}, got {where}")
        return float(said["ms"])

    def sample(self, calls: int) -> float:
        """Return milliseconds a call, over so many calls and the planted ones."""
        asked = {"calls": calls, "extra": round(self._version.planted * calls)}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["ms"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        status = f"exit status {self._process.returncode}"
        last = self._errors.read().strip().splitlines()[-1:] or [status]
        where = self._version.site or "the installed package"
        raise RuntimeError(f"a process of {where} ended: {last[0]}")


# ---- Another commit ------------------------------------------------------------------------------


@contextmanager
def built(ref: str) -> Iterator[Path]:
    """Build the package of another commit, and give its folder, which is removed afterwards.

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
            yield site
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
