"""A campaign of faults: each breaks a run of tiny M3I.

The run is then started again, and has to end with the weights, moments and losses of an undisturbed
one, bit for bit.

    m3i-fast faults                       a hundred kills, every write, every other fault; the page
    m3i-fast faults --kills 3 --writes 2  a few of each
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from m3i_fast.benchmarks.faults.faulted_process import Fault, digests, live
from m3i_fast.benchmarks.faults.held_port import hold_port
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.shard_files import PARTS
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.sources import openmoji
from m3i_fast.recipes import demo, shrink

STEPS = 12
STUCK = 300.0  # seconds after which a process that has not ended is said to hang
AGAIN = 3  # times that a run is started again at most
KILLED, SAVED, FAILED, REFUSED = -int(signal.SIGKILL), os.EX_TEMPFAIL, 1, 2
TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
Outcome = tuple[int, dict[str, str], list[tuple[float, float]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A fault at one place of a run."""

    fault: str
    where: str
    """Step, second, write or file."""
    ranks: int = 1
    spoil: Callable[[Campaign, Run], bool]
    """Trains until the fault, and says whether all ended as it should have."""
    equal: Callable[[Campaign, Run], bool] | None = None
    """Compares the run that went on to its end with something else than one without a fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of a run."""

    fault: str
    where: str
    recovered: bool
    """It ended as it should have, and came to its end when it was started again."""
    weights_equal: bool
    """And its last checkpoint and its losses are those of the run without a fault."""
    seconds: float
    log: str = ""
    """What the processes said, where not all is well."""


@dataclass(slots=True)
class Run:
    """A run directory, the processes that worked in it, and their exit codes."""

    folder: Path
    codes: list[list[int]] = field(default_factory=list)
    held: socket.socket = field(default_factory=hold_port)
    """Holds the port at which the ranks meet."""

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def saved(self) -> checkpoint.Checkpoint:
        return checkpoint.latest(self.out / "checkpoints")


class Campaign:
    """Starts processes, and knows what a run without a fault ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["m3i_fast.benchmarks.faults.faulted_process", "m3i_fast.cli.train"]
        )
        data = folder / "data"
        if not data.exists():
            openmoji.build(data, limit=60, labelled=0.5, num_merges=300, context_length=24)
        self.configs = {ranks: folder / f"config-{ranks}.json" for ranks in (1, 2)}
        for ranks, path in self.configs.items():
            config(data, ranks).save(path)
        counted, count = self.new(), folder / "operations.json"
        self.go(counted, inside={0: [("count", {"root": counted.out, "path": count})]})
        self.operations = [tuple(each) for each in json.loads(count.read_text())]
        """Kind and path of all that a run without a fault does to its files."""
        files = counted.saved.manifest()["files"].values()
        self.bytes_of_a_checkpoint = sum(file["size"] for file in files)
        began = time.monotonic()
        self.expected = {1: self._run_whole(1)}
        self.seconds = time.monotonic() - began
        """That such a run takes."""
        self.expected[2] = self._run_whole(2)

    def _run_whole(self, ranks: int) -> Outcome:
        run = self.new()
        self.go(run, ranks)
        if run.codes != [[0] * ranks]:
            raise RuntimeError(f"a run without a fault fails: {run.log.read_text()}")
        return outcome(run)

    def new(self) -> Run:
        run = Run(Path(tempfile.mkdtemp(dir=self.folder)))
        run.log.touch()
        return run

    def start(
        self,
        run: Run,
        ranks: int = 1,
        *flags: str,
        inside: Mapping[int, Sequence[Fault]] | None = None,
    ) -> list[BaseProcess]:
        """inside: rank -> faults."""
        arguments = ["--config", str(self.configs[ranks]), "--out", str(run.out), *flags]
        processes: list[BaseProcess] = []
        port = run.held.getsockname()[1]
        for rank in range(ranks):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            environment = {k: str(v) for k, v in world.items()} if ranks > 1 else {}
            environment |= {"MASTER_ADDR": "localhost", "COLUMNS": "200"}
            faults = (inside or {}).get(rank, ())
            processes.append(
                self._context.Process(target=live, args=(arguments, run.log, environment, faults))
            )
            processes[-1].start()
        return processes

    def go(
        self,
        run: Run,
        ranks: int = 1,
        *flags: str,
        inside: Mapping[int, Sequence[Fault]] | None = None,
        kill_after: float | None = None,
    ) -> None:
        """Start the run, or go on with it, and wait for its end; a kill is of the last rank."""
        processes = self.start(run, ranks, *(flags or ("--auto-resume",)), inside=inside)
        if kill_after is not None:
            processes[-1].join(kill_after)
            processes[-1].kill()
        run.codes.append(wait(processes))

    def again(self, run: Run, ranks: int = 1) -> bool:
        """Start it until it ends well."""
        for _ in range(AGAIN):
            self.go(run, ranks)
            if run.codes[-1] == [0] * ranks:
                return True
        return False

    def judge(self, trial: Trial) -> Verdict:
        """Spoil a run, start it again, compare."""
        run, began, recovered, equal = self.new(), time.monotonic(), False, False
        try:
            recovered = trial.spoil(self, run) and self.again(run, trial.ranks)
            if recovered and trial.equal is None:
                equal = outcome(run) == self.expected[trial.ranks]
            elif recovered and trial.equal is not None:
                equal = trial.equal(self, run)
        except Exception:
            with run.log.open("a") as file:
                traceback.print_exc(file=file)
        log = "" if equal else f"{run.codes} {run.log.read_text()[-2000:]}"
        shutil.rmtree(run.folder)
        run.held.close()
        return Verdict(
            fault=trial.fault,
            where=trial.where,
            recovered=recovered,
            weights_equal=equal,
            seconds=round(time.monotonic() - began, 1),
            log=log,
        )


def config(data: Path, ranks: int) -> TrainConfig:
    """Return M3I with all its terms, of a batch of 8 over all ranks."""
    cfg = shrink(demo(), path=data, num_classes=9, text=TEXT)
    return replace(
        cfg,
        num_steps=STEPS,
        num_threads=1,
        checkpoint_every=2,
        data=replace(cfg.data, batch_size=8 // ranks),
        optim=replace(cfg.optim, matrices="adamw"),
    )


def outcome(run: Run) -> Outcome:
    """Return step and digests of the last checkpoint's tensors, and the losses of kept steps."""
    saved = run.saved
    tensors_by_part = {part: saved.shards(part).read() for part in PARTS}
    tensors = {
        f"{part}/{name}": tensor
        for part, tensors_of_part in tensors_by_part.items()
        for name, tensor in tensors_of_part.items()
    }
    losses = [
        (row["step"], row["loss/total"])
        for row in read_jsonl(run.out / "metrics.jsonl")
        if "loss/total" in row
    ]
    return saved.step, digests(tensors), losses


def wait(processes: Sequence[BaseProcess]) -> list[int]:
    """Return the exit codes. Raises TimeoutError, and ends all processes, where one hangs."""
    ends = time.monotonic() + STUCK
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
    hang = [number for number, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
        process.join()
    if hang:
        raise TimeoutError(f"ranks {hang} had not ended after {STUCK:g} s")
    return [int(process.exitcode or 0) for process in processes]
