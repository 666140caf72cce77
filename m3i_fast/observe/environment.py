"""The environment of a run or a measurement: command, commit, versions and hardware."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from m3i_fast.durable_files import write_atomically

NULL_RUNTIME = "null CUDA runtime"
_LEDGER = "benchmarks/results"  # new rows of a benchmark do not make the checkout dirty


@dataclass(frozen=True, slots=True)
class Environment:
    """What a run or a measurement was made with."""

    command: str
    """Command line, quoted for a shell."""
    commit: str | None
    """Commit of the project's checkout, with -dirty for uncommitted changes; None for a wheel."""
    python: str
    torch: str
    cuda: str | None
    cpu: str
    num_cores: int
    gpu: str | None
    num_gpus: int
    attention: str | None = None
    """Kernel of attention in a training step; None without one."""

    def save(self, path: Path) -> None:
        """Write it to `path` as JSON."""
        write_atomically(path, (json.dumps(asdict(self), indent=2) + "\n").encode())


def environment(attention: str | None = None) -> Environment:
    """Return the environment of this process. attention: as the field of `Environment`."""
    num_gpus = torch.cuda.device_count()
    return Environment(
        command=shlex.join(["m3i-fast", *sys.argv[1:]]),
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cpu=_cpu_name(),
        num_cores=num_cores(),
        gpu=gpu_name(0) if num_gpus else None,
        num_gpus=num_gpus,
        attention=attention,
    )


def is_null_runtime() -> bool:
    """Return whether this process runs on the null CUDA runtime, which computes nothing."""
    return hasattr(ctypes.CDLL(None), "null_cuda_mark")


def gpu_name(index: int) -> str:
    """Return torch's name of a GPU; that of a null device says so, and is no card's."""
    name: str = torch.cuda.get_device_name(index)
    return f"{name} ({NULL_RUNTIME})" if is_null_runtime() else name


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    status = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)" + _LEDGER],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
