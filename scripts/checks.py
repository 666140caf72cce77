"""Run the groups of tests that make names, and in CI some of them.

    python -m scripts.checks cuda [pytest's arguments]   one group: make test-cuda
    python -m scripts.checks stale                       every group that a change has made stale
    python -m scripts.checks ci                          one group in turn, and those that must run
    python -m scripts.checks full                        all groups, whatever was run before

A group that passes writes the digest of its inputs into build/passed.json. A group is stale if its
digest is another one. CI runs one group in turn by the number of commits, and those of ALWAYS. A
test of no group belongs to the gate, `make test`.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PASSED = ROOT / "build" / "passed.json"
# Emulated kernels and mypy's results, by digests of their sources: every checkout shares them.
CACHE = Path(os.environ.get("M3I_TEST_CACHE") or Path.home() / ".cache" / "m3i-fast" / "tests")
GATE = "gate"
# Folders of modules, by the name that they are imported by.
PACKAGES = {
    "m3i_fast": "m3i_fast",
    "m3i_fast.pipelines": "pipelines",
    "m3i_fast.benchmarks": "benchmarks",
    "tests": "tests",
    "scripts": "scripts",
}
BUILD = ("CMakeLists.txt", "pyproject.toml", "constraints.txt")
PYTHON = ("m3i_fast", "pipelines", "benchmarks")


@dataclass(frozen=True, slots=True)
class Group:
    """A part of the tests."""

    title: str
    tests: tuple[str, ...] = ()
    """Folders and files whose tests all belong to it. Single tests are marked with its name."""
    reads: tuple[str, ...] = ()
    """Folders and files that its tests read, besides the modules that they import."""
    first: tuple[str, ...] = ()
    """Scripts that install programs for it."""
    module: str = ""
    """The module that runs it, if it is not this Python's pytest."""


GROUPS = {
    "cuda": Group(
        "kernels compiled by nvcc and run on the emulator, sanitizers",
        tests=(
            *("tests/cuda", "tests/ops/*/test_cuda*.py", "tests/ops/test_sanitised.py"),
            *("tests/benchmarks/tune", "tests/benchmarks/sass"),
            "tests/benchmarks/roofline/test_kernels.py",
            "tests/null_cuda/test_runtime.py",
        ),
        reads=(
            *BUILD,
            "cuda",
            "tests/cuda",
            "tests/shared/cuda",
            "tests/benchmarks/sass",
            "benchmarks/ledger/row.schema.json",
        ),
    ),
    "distributed": Group(
        "four ranks, HSDP, launchers, Slurm, killed processes",
        tests=("tests/launch", "tests/engine/parallel/test_runs.py"),
        reads=(*BUILD, *PYTHON, "cuda", "launch"),
        first=("scripts/slurm.sh",),
    ),
    "matrix": Group(
        "every recipe, method and dtype in every check, and the benchmarks",
        tests=tuple(
            f"tests/benchmarks/{name}"
            for name in (
                *("compare", "launches", "loader", "methods", "node", "one_stage"),
                *("ops", "scaling", "training"),
            )
        ),
        reads=(
            *(*BUILD, *PYTHON, "cuda", "tests/shared/inspect_page.js", "docs/start"),
            *("docs/measure/one_stage.md", "docs/extend/new_method.md"),
            *("benchmarks/results/methods.jsonl", "benchmarks/results/one_stage.jsonl"),
        ),
    ),
    "pages": Group(
        "the documentation's site and commands, pages in a browser, recordings by nsys",
        tests=("tests/docs",),
        reads=(
            *(*BUILD, *PYTHON, "cuda", "docs", "README.md", "tests/shared/inspect_page.js"),
            "benchmarks/results",
        ),
        first=("scripts/chromium.sh", "scripts/nsys.py"),
    ),
    "first-contact": Group(
        "CUDA's torch on the null runtime",
        tests=("tests/null_cuda/contract_*.py",),
        reads=(
            *(*BUILD, "constraints-cuda.txt", *PYTHON, "cuda", "scripts", "docs/start"),
            *("tests/null_cuda", "benchmarks/results"),
        ),
        module="scripts.first_contact",
    ),
    "wheels": Group(
        "the wheel in fresh environments",
        reads=(*BUILD, "constraints-cuda.txt", *PYTHON, "cuda", "scripts", "docs/start/adapt.md"),
        module="scripts.wheel_matrix",
    ),
}


# CI runs these whenever one of these paths changed since the commit in .ci/passed.
ALWAYS = {
    "first-contact": ("cuda", "m3i_fast/ops"),
    "wheels": ("pyproject.toml", "CMakeLists.txt", "scripts"),
}


# ---- Inputs --------------------------------------------------------------------------------------


@cache
def tracked() -> frozenset[str]:
    """Return the repository's files, new ones included that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return frozenset(name for name in shown.stdout.split("\0") if (ROOT / name).is_file())


def below(file: str, places: Sequence[str]) -> bool:
    """Return whether a file is one of these files, matches a pattern, or is in a folder of them."""
    path = Path(file)
    return any(path.match(place) or file.startswith(f"{place}/") for place in places)


def group_of_file(file: str) -> str:
    """Return the group of all tests of a file; the gate unless a group names the file."""
    return next((name for name, group in GROUPS.items() if below(file, group.tests)), GATE)


@cache
def test_files(name: str) -> list[str]:
    """Return the files whose tests are of a group: all, or those that they or an import mark."""

    def is_marked(file: str) -> bool:
        texts = [file, *(other for other in imported(file) if other.startswith("tests/"))]
        return any(f"mark.{name}" in (ROOT / text).read_text() for text in texts)

    return sorted(
        file
        for file in tracked()
        if file.startswith("tests/")
        and file.endswith(".py")
        and Path(file).name.startswith(("test_", "contract_"))
        and (group_of_file(file) == name or (group_of_file(file) == GATE and is_marked(file)))
    )


@cache
def modules() -> dict[str, str]:
    """Return the file of each module of the repository by its full name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in tracked():
            if file.startswith(f"{folder}/") and file.endswith(".py"):
                inner = file[len(folder) : -len(".py")].removesuffix("/__init__")
                found[package + inner.replace("/", ".")] = file
    return found


@cache
def imported(file: str) -> frozenset[str]:
    """Return the repository's files that a file imports, in functions too, but not for types.

    A test's folders' conftest.py, which pytest imports, are among them.
    """

    def nodes(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            for child in ast.iter_child_nodes(node):
                yield from nodes(child)

    names: set[str] = set()
    for node in nodes(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parents = {name.rsplit(".", n)[0] for name in names for n in range(name.count(".") + 1)}
    fixtures = {f"{folder}/conftest.py" for folder in Path(file).parents} & tracked()
    return frozenset({modules()[name] for name in parents & modules().keys()} | fixtures)


@cache
def input_files(name: str) -> frozenset[str]:
    """Return the files that a group depends on: tests, all that they import, and `reads`."""
    todo = test_files(name)[:]
    found: set[str] = set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += imported(file)
    reads = {file for file in tracked() if below(file, GROUPS[name].reads)}
    # New rows of the ledger matter only to a group that names them.
    named = [place for place in GROUPS[name].reads if place.startswith("benchmarks/results")]
    rows = {f for f in reads if below(f, ("benchmarks/results",)) and not below(f, named)}
    # This file is read by all; the group's own part of it is in the digest.
    return frozenset((found | reads) - rows - {"scripts/checks.py"})


def tools() -> list[str]:
    """Return the versions of what builds and runs the tests."""
    shown = [sys.version, version("torch")]
    for command in (["g++", "--version"], [str(ROOT / ".venv" / "bin" / "nvcc"), "--version"]):
        shown.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return shown


def digest(name: str) -> str:
    """Hash all that a group's result depends on."""
    state = hashlib.sha256(json.dumps([name, repr(GROUPS[name]), *tools()]).encode())
    for file in sorted(input_files(name)):
        state.update(f"\0{file}\0".encode() + (ROOT / file).read_bytes())
    return state.hexdigest()[:16]


def passed() -> dict[str, str]:
    """Return the digest of each group at its last success."""
    kept: dict[str, str] = json.loads(PASSED.read_text()) if PASSED.is_file() else {}
    return kept


def stale() -> list[str]:
    """Return the groups whose inputs changed after their last success."""
    return [name for name in GROUPS if passed().get(name) != digest(name)]


def due() -> dict[str, str]:
    """Return the groups that CI runs, each with the reason."""
    command = ["git", "rev-list", "--count", "HEAD"]
    count = int(subprocess.check_output(command, cwd=ROOT, text=True))
    why = {list(GROUPS)[count % len(GROUPS)]: f"its turn, commit {count}"}
    passed_commit = (ROOT / ".ci" / "passed").read_text().strip()
    for name, paths in ALWAYS.items():
        # An unknown commit, as in a clone without history, counts as a change.
        diff = ["git", "diff", "--quiet", passed_commit, "HEAD", "--", *paths]
        if subprocess.run(diff, cwd=ROOT, stderr=subprocess.DEVNULL).returncode:
            why.setdefault(name, f"{', '.join(paths)} changed since {passed_commit}")
    return why


# ---- Running -------------------------------------------------------------------------------------


def command_of(name: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs the gate or a group."""
    if name != GATE and GROUPS[name].module:
        return [sys.executable, "-m", GROUPS[name].module, *arguments]
    workers = [] if "-n" in arguments else ["-n", "2"]
    chosen = [] if "-m" in arguments else ["-m", "not nightly"]
    files = [] if name == GATE or _names_files(arguments) else test_files(name)
    spread = ["--dist", "loadfile", "--no-loadscope-reorder"]
    pytest = [sys.executable, "-m", "pytest", f"--group={name}"]
    return [*pytest, *workers, *spread, *chosen, *arguments, *files]


def _names_files(arguments: Sequence[str]) -> bool:
    return any(argument.startswith("tests/") for argument in arguments)


def run(name: str, arguments: Sequence[str] = ()) -> None:
    """Run the gate or a group, print its cost, and exit with its status if it fails."""
    for script in () if name == GATE else GROUPS[name].first:
        program = [sys.executable] if script.endswith(".py") else []
        subprocess.run([*program, str(ROOT / script)], cwd=ROOT, check=True)
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    status = subprocess.run(command_of(name, arguments), cwd=ROOT).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name}: {time.monotonic() - start:.0f} s, {cpu:.0f} CPU-s", flush=True)
    if status:
        sys.exit(status)


def main(arguments: Sequence[str]) -> None:
    """Run what the first argument names."""
    first, rest = arguments[0] if arguments else "", arguments[1:]
    if first == GATE:
        run(GATE, rest)
    elif first in GROUPS:
        before = digest(first)
        run(first, rest)
        # A part of a group says nothing about the rest of it.
        if not rest:
            PASSED.parent.mkdir(exist_ok=True)
            PASSED.write_text(
                json.dumps({**passed(), first: before}, indent=2, sort_keys=True) + "\n"
            )
    elif first == "full":
        for name in (GATE, *GROUPS):
            run(name)
    elif first == "stale":
        names = stale()
        print(f"groups to run: {', '.join(names) or 'none'}", flush=True)
        for name in names:
            main([name])
    elif first == "ci":
        why = due()
        print("groups to run:", "; ".join(f"{n}: {why[n]}" for n in why), flush=True)
        for name in why:
            run(name)
    else:
        sys.exit(f"checks: expected {GATE}, {', '.join(GROUPS)}, stale, ci or full, got {first!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
