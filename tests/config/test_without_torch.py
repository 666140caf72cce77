"""What a person only asks or mistypes is answered without torch, which takes seconds to load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from m3i_fast.cli import VERBS
from tests.shared.groups import at_gate

COMPILER = "torch._dynamo.convert_frame"
HEAVY = ("torch", "numpy", "nvidia", "m3i_fast._C", "m3i_fast.ops", "m3i_fast.models", COMPILER)


def loaded_by(program: str) -> str:
    """Run a program in a new process; returns which of HEAVY it has loaded, one a line."""
    ends = f"import sys\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)), sep='\\n')"
    run = [sys.executable, "-c", f"{program}\n{ends}"]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


MODULES = (
    "m3i_fast",
    "m3i_fast.config",
    "m3i_fast.config.objective.losses",
    "m3i_fast.objectives.methods",
    "m3i_fast.recipes",
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_facts_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == ""


@pytest.mark.parametrize(
    "program", ["import m3i_fast.engine.trainer", "import m3i_fast as m; m.load"]
)
def test_what_runs_a_model_does_not_load_torchs_compiler(program: str) -> None:
    """Nearly half a second of every start, for what --compile alone asks for."""
    loaded = loaded_by(program).split()
    assert "m3i_fast.models" in loaded and COMPILER not in loaded


ANSWERED = [
    (["--help"], 0),
    (["recipes"], 0),
    (["methods"], 0),
    (["methods", "--explain", "m3i"], 0),
    (["methods", "--explain", "mi3"], 2),
    (["methods", "--help"], 0),
    (["methods", "--tyro-print-completion", "bash"], 0),
    (["recipes", "--tyro-print-completion", "zsh"], 0),
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


def loaded_by_answering(argv: list[str], code: int) -> str:
    """Run the command line in a new process, and check its exit code; returns as `loaded_by`."""
    program = (
        "import contextlib, io\n"
        "from m3i_fast.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    try:\n        code = main({argv!r})\n"
        "    except SystemExit as ended:\n        code = ended.code or 0\n"
        f"assert code == {code}, code"
    )
    return loaded_by(program)


@pytest.mark.parametrize(
    ("argv", "code"), at_gate(ANSWERED[4:10:5], ANSWERED), ids=lambda value: str(value)
)
def test_the_command_line_answers_without_what_is_heavy(argv: list[str], code: int) -> None:
    assert loaded_by_answering(argv, code) == ""


# The verbs whose flags a shell completes; launch hands its arguments on to torchrun.
COMPLETED = {
    **{verb: [verb] for verb in VERBS if verb not in ("launch", "bench")},
    **{verb: [verb, "demo"] for verb in ("train", "plan", "profile")},
}
# What no table names: the help of commands that a verb has, or takes a recipe's flags with.
INNER = (
    *([verb, "demo", "--help"] for verb in ("train", "plan", "profile")),
    *(["checkpoint", name, "--help"] for name in ("ls", "verify", "consolidate")),
    *(["data", name, "--help"] for name in ("openmoji", "styles", "synthetic", "verify")),
    ["profile", "diff", "--help"],
    ["--version"],
)


@pytest.mark.parametrize(
    "verb", at_gate(("evaluate",), [verb for verb in VERBS if verb != "bench"])
)
def test_the_help_of_every_verb_loads_nothing_heavy(verb: str) -> None:
    assert loaded_by_answering([verb, "--help"], 0) == ""


@pytest.mark.parametrize("argv", at_gate(INNER[:1], INNER), ids=" ".join)
def test_the_help_of_a_command_of_a_verb_loads_nothing_heavy(argv: list[str]) -> None:
    assert loaded_by_answering(argv, 0) == ""


@pytest.mark.parametrize("verb", at_gate(("train",), COMPLETED))
def test_the_completion_of_a_shell_loads_nothing_heavy(verb: str) -> None:
    argv = [*COMPLETED[verb], "--tyro-print-completion", "bash"]
    assert loaded_by_answering(argv, 0) == ""


REFUSED = [
    ["plan", "demo", "--card", "h1000"],
    ["plan", "demo", "--gpus", "0"],
    ["profile", "demo", "--profiler", "nsight"],
    ["launch", "--retry-code", "no"],
    ["data", "openmojis"],
]


@pytest.mark.parametrize("argv", at_gate(REFUSED[:1], REFUSED), ids=" ".join)
def test_what_is_mistyped_is_refused_without_what_is_heavy(argv: list[str]) -> None:
    assert loaded_by_answering(argv, 2) == ""


def test_what_is_heavy_is_seen() -> None:
    assert "torch" in loaded_by("import m3i_fast.objectives.objective").split()
