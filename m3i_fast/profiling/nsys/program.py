"""Runs this program again under nsys, and exports what it recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from m3i_fast.profiling.capture import CAPTURE, ended_by_signals

ON_GPU = (
    "--trace=cuda,nvtx,cublas,cudnn",
    "--cuda-graph-trace=node",
    "--capture-range=cudaProfilerApi",
)
ON_CPU = ("--trace=nvtx,osrt", "--capture-range=nvtx", f"--nvtx-capture={CAPTURE}")


def run_under_nsys(arguments: list[str], out: Path, device: torch.device) -> Path:
    """Run `m3i-fast ARGUMENTS` under nsys and return the report in `out`.

    nsys records only while the program has `NsysProfiler` open, and lets it continue after that.
    Raises RuntimeError where the program or nsys fails, or leaves no report.
    """
    report = out / "report.nsys-rep"
    command = [
        "nsys",
        "profile",
        *(ON_GPU if device.type == "cuda" else ON_CPU),
        "--sample=none",
        "--cpuctxsw=none",
        "--capture-range-end=stop",
        "--force-overwrite=true",
        f"--output={report.with_suffix('')}",
        sys.executable,
        "-m",
        "m3i_fast.cli",
        *arguments,
    ]
    if code := _run(command):
        raise RuntimeError(f"nsys profile ended with {code}; --profiler torch needs no nsys")
    return _expect(report, "nsys profile")


def _run(command: list[str]) -> int:
    """Run the command and return its exit code; what ends this program also ends nsys."""
    # Ranges open a capture by their text, not only by a string that was registered with NVTX.
    environment = {**os.environ, "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0"}
    with ended_by_signals(), subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()  # at Ctrl-C Popen itself would not
            raise


def export(report: Path) -> Path:
    """Export the report as SQLite beside it; raise RuntimeError where nsys fails."""
    path = report.with_suffix(".sqlite")
    command = ["nsys", "export", "--type=sqlite", "--force-overwrite=true", f"--output={path}"]
    done = subprocess.run([*command, str(report)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nsys export ended with {done.returncode}: {done.stderr.strip()}")
    return _expect(path, "nsys export")


def _expect(path: Path, program: str) -> Path:
    if not path.is_file():
        raise RuntimeError(f"{program} left no {path}")
    return path
