"""Threads of a loader: their name, which tools of the system show, and the cores that they run on.

Those are the cores of the NUMA node of the rank's GPU, so that pictures stay beside it: what a
thread reads and writes of them would go through the link between the processors otherwise. Of the
cores that this process may use (a cgroup's, Slurm's, those of torchrun --numa-binding) some are
chosen, and never one that is not among them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from m3i_fast.config.data import AffinityName

logger = logging.getLogger(__name__)

SYSFS = Path("/sys")
Cores = frozenset[int]


# ---- Starting threads ----------------------------------------------------------------------------


def start_pool(num_threads: int, name: str, cores: Cores | None = None) -> ThreadPoolExecutor:
    """Return a pool of threads that Python and the system call by this name.

    name: at most 15 bytes, which is what Linux keeps. cores: that they run on; None: where the
    system puts them. Threads of C++ that they start inherit both.
    """
    assert len(name.encode()) <= 15, name
    return ThreadPoolExecutor(num_threads, name, initializer=begin_thread, initargs=(name, cores))


def begin_thread(name: str, cores: Cores | None) -> None:
    """Tell Linux the name of this thread, which Python does by itself from 3.14 on; and its cores.

    A pool starts its threads when it is given work, so that they cannot inherit their cores.
    """
    with suppress(OSError):  # another system, or one whose /proc is not to be written
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
    if cores is not None:
        _run_on(cores)


def _run_on(cores: Cores) -> None:
    """Have this thread run on these cores, or where it does if the system refuses them."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:  # the process may no longer use them: its cpuset has changed
        _tell_refused(cores, error.strerror)


@cache
def _tell_refused(cores: Cores, reason: str) -> None:
    logger.warning(
        "data.affinity: expected cores that this process may use, got %s (%s): left to the system",
        format_cores(cores),
        reason,
    )


@contextmanager
def threads_on(cores: Cores | None) -> Iterator[None]:
    """Have the threads that are started inside run on these cores; None: where they would."""
    if cores is None:
        yield
        return
    own = frozenset(os.sched_getaffinity(0))  # of this thread
    _run_on(cores)
    try:
        yield
    finally:
        _run_on(own)


# ---- Choosing their cores ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the threads of a rank's loader run."""

    cores: Cores | None
    """None: where the system puts them."""
    reason: str
    """Which cores these are, or why none are chosen."""
    is_wrong: bool = False
    """Whether this machine forbids what is best on it."""


def place_loader(affinity: AffinityName, num_threads: int, device_id: int | None) -> Placement:
    """Choose the cores of the loader of this process, a rank of those that torchrun counts here.

    device_id: the rank's GPU; None: the CPU. The log says it once.
    """
    if affinity == "none":
        return Placement(None, "left to the system")
    nodes, gpu = numa_nodes(SYSFS), None
    if device_id is not None:
        gpu = device_id, node_of_gpu(device_id, SYSFS) if len(nodes) > 1 else None
    placement = choose(
        nodes,
        allowed_cores(),
        num_threads=num_threads,
        gpu=gpu,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        ranks_a_node=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    _tell(placement)
    return placement


@cache
def _tell(placement: Placement) -> None:
    level = logging.WARNING if placement.is_wrong else logging.INFO
    logger.log(level, "data.affinity: the loader's threads: %s", placement.reason)


def choose(
    nodes: Mapping[int, Cores],
    allowed: Cores,
    *,
    num_threads: int,
    gpu: tuple[int, int | None] | None,
    local_rank: int,
    ranks_a_node: int,
) -> Placement:
    """Choose among the cores that this process may use.

    nodes: of NUMA, with their cores. gpu: the rank's, and its node if that is known; without one
    the ranks of this machine are dealt to the nodes in blocks, where there is one for each.
    """
    if len(nodes) < 2:
        return Placement(None, "left to the system, which has one NUMA node")
    usable = {node: cores & allowed for node, cores in sorted(nodes.items()) if cores & allowed}
    if gpu is not None:
        number, node = gpu
        if node is None:
            return Placement(None, f"left to the system, which names no NUMA node of GPU {number}")
        if node not in usable:
            return Placement(
                None,
                f"expected cores of NUMA node {node}, where GPU {number} is, among those that this "
                f"process may use, got none ({format_cores(allowed)}): left to the system",
                is_wrong=True,
            )
    elif ranks_a_node < len(usable):
        return Placement(
            None,
            f"left to the system: {ranks_a_node} ranks without a GPU on {len(usable)} NUMA nodes",
        )
    else:
        node = list(usable)[local_rank * len(usable) // ranks_a_node]
    cores = usable[node]
    if len(cores) < min(num_threads, len(allowed)):
        return Placement(
            None,
            f"left to the system: {num_threads} threads, and {len(cores)} cores of NUMA node "
            f"{node} that this process may use",
        )
    return Placement(cores, f"cores {format_cores(cores)} of NUMA node {node}")


def numa_nodes(sysfs: Path) -> dict[int, Cores]:
    """Return the cores of each NUMA node that has some; none where the system does not tell."""
    files = (sysfs / "devices" / "system" / "node").glob("node[0-9]*/cpulist")
    nodes = {int(file.parent.name.removeprefix("node")): parse_cores(file) for file in files}
    return {node: cores for node, cores in sorted(nodes.items()) if cores}


def allowed_cores() -> Cores:
    """Return the cores that this thread may use; none where the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def node_of_gpu(device_id: int, sysfs: Path) -> int | None:
    """Return the NUMA node that a GPU is attached to; None where the system does not tell."""
    gpu: Any = torch.cuda.get_device_properties(device_id)  # torch's stubs lack its address
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    file = sysfs / "bus" / "pci" / "devices" / address / "numa_node"
    node = int(file.read_text()) if file.is_file() else -1
    return node if node >= 0 else None


def parse_cores(file: Path) -> Cores:
    """Read a list of cores as Linux writes it: 0-3,8."""
    cores: set[int] = set()
    for part in filter(None, file.read_text().strip().split(",")):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def format_cores(cores: Iterable[int]) -> str:
    """Write cores as Linux does: 0-3,8."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and runs[-1][1] == core - 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
