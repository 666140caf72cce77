"""Python in a process whose CPU kernels are held to a set of instructions."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.shared.ranks import run_script

# Torch reads the variable at its first kernel, and importing it runs none.
_CHECK = """
import torch
sets = ["default", "avx2", "avx512"]
found = torch.backends.cpu.get_cpu_capability().lower()
assert sets.index(found) <= sets.index({capability!r}), found
"""


def run_held_to(capability: str, code: str) -> str:
    """Run code with ATEN_CPU_CAPABILITY, torch's own switch, which lowers ours; what it printed.

    Fails the test, with the traceback, if the code raises.
    """
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        script = Path(folder) / "held.py"
        script.write_text(_CHECK.format(capability=capability) + code)
        patch.setenv("ATEN_CPU_CAPABILITY", capability)
        return run_script(script)
