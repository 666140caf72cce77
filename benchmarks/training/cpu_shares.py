"""How torch and the loader best share a CPU's cores: OpenMP threads spin while they wait.

    m3i-fast bench cpu_shares

Trains the demo for some steps in a fresh process for each setting, round after round, and reports
images a second.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from m3i_fast.benchmarks.ledger.rows import append_row
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.dataset.manifest import is_dataset
from m3i_fast.recipes import demo, pack_demo
from m3i_fast.terminal import make_console

SUBJECT = "cpu_shares"
MODULE = ("m3i_fast.benchmarks", "cpu_shares")
POLICIES = ("ACTIVE", "PASSIVE")
console = make_console()


@dataclass(frozen=True, kw_only=True)
class CpuShares:
    num_steps: int = 60
    """Steps of a measurement; the first third is not timed."""
    rounds: int = 2
    """Measurements of each setting."""
    data: Path = Path("data/openmoji")
    """Dataset directory; packed when it is not there."""
    record: bool = True
    """Append a row to the ledger."""
    child_threads: int | None = None
    """For the processes that this command starts: measure with that many threads, and print it."""


def main(argv: list[str] | None = None) -> None:
    command = tyro.cli(CpuShares, prog="m3i-fast bench cpu_shares", args=argv)
    if command.child_threads is not None:
        sys.stdout.write(f"{_images_per_s(command)}\n")
        return
    if not is_dataset(command.data):
        pack_demo(command.data)
    cores = os.cpu_count() or 1
    settings = [(n, policy) for n in sorted({1, max(cores - 1, 1), cores}) for policy in POLICIES]
    found: dict[str, list[float]] = {}
    for _ in range(command.rounds):
        for threads, policy in settings:
            name = f"torch {threads} of {cores}, OMP_WAIT_POLICY={policy}"
            found.setdefault(name, []).append(_in_child(command, threads, policy))
            console.print(f"{name}: {found[name][-1]:.0f} images/s")
    figures = {name: statistics.median(values) for name, values in found.items()}
    if command.record:
        append_row(SUBJECT, {"images_per_s": figures, "rounds": command.rounds})


def _in_child(command: CpuShares, threads: int, policy: str) -> float:
    arguments = ["--child-threads", str(threads), "--num-steps", str(command.num_steps)]
    run = subprocess.run(
        [sys.executable, "-m", *MODULE, *arguments, "--data", str(command.data)],
        env={**os.environ, "OMP_WAIT_POLICY": policy},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(run.stdout.splitlines()[-1])


def _images_per_s(command: CpuShares) -> float:
    cfg = demo(data=command.data)
    cfg = replace(cfg, num_steps=command.num_steps, num_threads=command.child_threads or 0)
    warm = command.num_steps // 3
    with TemporaryDirectory() as scratch:
        trainer = Trainer(cfg, Path(scratch) / "run")
        began = 0.0
        for step in range(command.num_steps):
            if step == warm:
                began = time.perf_counter()
            trainer.train_step(next(trainer.loader))
        seconds = time.perf_counter() - began
        trainer.loader.close()
    return (command.num_steps - warm) * cfg.data.batch_size / seconds
