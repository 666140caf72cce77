"""Runs this program again under nsys, and exports what it recorded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from m3i_fast.profiling.capture import ended_by_signals

TRACES = "cuda,nvtx,cublas,cudnn"


def run_under_nsys(arguments: list[str], out: Path) -> Path:
    """Run `m3i-fast ARGUMENTS` under nsys and return the report in `out`.

    nsys records between cudaProfilerStart and cudaProfilerStop only, and lets the program continue.
    Raises RuntimeError where the program or nsys fails, or leaves no report.
    """
    report = out / "report.nsys-rep"
    command = [
        "nsys",
        "profile",
        f"--trace={TRACES}",
        "--sample=none",
        "--cpuctxsw=none",
        "--cuda-graph-trace=node",
        "--capture-range=cudaProfilerApi",
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
    with ended_by_signals(), subprocess.Popen(command) as process:
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
