"""What a person only asks or mistypes is answered without torch, which takes seconds to load."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "nvidia", "m3i_fast._C", "m3i_fast.ops", "m3i_fast.models")


def loaded_by(program: str) -> str:
    """Run a program in a new process; returns which of HEAVY it has loaded, one a line."""
    ends = f"import sys\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)), sep='\\n')"
    run = [sys.executable, "-c", f"{program}\n{ends}"]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


MODULES = ("m3i_fast", "m3i_fast.config", "m3i_fast.objectives.methods", "m3i_fast.recipes")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_facts_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == ""


def test_what_is_heavy_is_seen() -> None:
    assert "torch" in loaded_by("import m3i_fast.objectives.objective").split()
