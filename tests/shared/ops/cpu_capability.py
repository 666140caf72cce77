"""Python in a process whose CPU kernels are held to a set of instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_held_to(capability: str, code: str) -> str:
    """Run code with ATEN_CPU_CAPABILITY, torch's own switch, which lowers ours; what it printed.

    Fails the test, with the traceback, where the code raises.
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
