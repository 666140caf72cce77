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


ANSWERED = [
    (["--help"], 0),
    (["recipes"], 0),
    (["methods"], 0),
    (["methods", "--explain", "m3i"], 0),
    (["train", "--help"], 0),
    (["train", "demo", "--help"], 0),
    (["train", "demo", "--help-all"], 0),
    (["train", "m3i_internimage_h", "--tyro-print-completion", "bash"], 0),
    (["train", "dem"], 2),
    (["train", "demo", "--optim.learning-rate", "1"], 2),
    (["train", "demo", "--parallel.shard", "2"], 2),
    (["bench"], 2),
    (["bench", "--help"], 0),
    (["bench", "boltzman"], 2),
]


@pytest.mark.parametrize(("argv", "code"), ANSWERED, ids=lambda value: str(value))
def test_the_command_line_answers_without_what_is_heavy(argv: list[str], code: int) -> None:
    program = (
        "import contextlib, io\n"
        "from m3i_fast.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    try:\n        code = main({argv!r})\n"
        "    except SystemExit as ended:\n        code = ended.code or 0\n"
        f"assert code == {code}, code"
    )
    assert loaded_by(program) == ""


def test_what_is_heavy_is_seen() -> None:
    assert "torch" in loaded_by("import m3i_fast.objectives.objective").split()
