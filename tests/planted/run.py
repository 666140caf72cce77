# ruff: noqa: T201
"""Plant the faults of this folder one by one, and show which group of tests finds each.

    python -m tests.planted.run [NAME ...] [--files | --group NAME | --all | --tests FILE ...]

Each patch is applied to a scratch worktree of HEAD, on which the tests of its `Found by` lines run.
The exit status is 1 if these find a fault no longer. Results are kept in build/planted.json by
commit, patch and choice of tests, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import checks

HERE = Path(__file__).parent
KEPT = checks.ROOT / "build" / "planted.json"
FAILED = "M3I_PLANTED_FAILED"
"""Environment variable: the file to which each failed test is appended."""
_EDITABLE = "_editable_skbc_m3i_fast.py"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and FAILED in os.environ:
        _note(report.nodeid, checks.group_of_file(report.nodeid.partition("::")[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):  # type: ignore[no-untyped-def]
    report = yield
    if report.failed and FAILED in os.environ:
        file = item.nodeid.partition("::")[0]
        marks = (name for name in checks.GROUPS if item.get_closest_marker(name))
        _note(item.nodeid.partition("[")[0], next(marks, checks.group_of_file(file)))
    return report


def _note(test: str, group: str) -> None:
    with Path(os.environ[FAILED]).open("a") as file:
        file.write(f"{test} ({group})\n")


def header(patch: Path) -> tuple[str, list[str]]:
    """Return the sentence of a patch, and its tests with their groups."""
    text = patch.read_text().partition("\n--- ")[0]
    (fault,) = re.findall(r"^Fault: (.+)$", text, re.M)
    return fault, re.findall(r"^Found by: (\S+ \([\w-]+\))$", text, re.M)


def touched(patch: Path) -> list[str]:
    """Return the files that a patch changes."""
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.M)


def environment(tree: Path, scratch: Path) -> dict[str, str]:
    """Return variables with which Python, child processes too, imports the worktree's modules.

    The editable install maps module names to files of the checkout. A copy of it that maps to the
    worktree is imported in its place.
    """
    (installed,) = (checks.ROOT / ".venv").glob(f"lib/python3*/site-packages/{_EDITABLE}")
    text = installed.read_text().replace(f"'{checks.ROOT}/", f"'{tree}/")
    text = text.replace("os.path.abspath(os.path.dirname(__file__))", repr(str(installed.parent)))
    (scratch / "path").mkdir()
    (scratch / "path" / _EDITABLE).write_text(text)
    return {**os.environ, "PYTHONPATH": f"{scratch / 'path'}:{tree}", FAILED: f"{scratch}/failed"}


def find(patch: Path, tests: Sequence[str], tree: Path, variables: dict[str, str]) -> list[str]:
    """Plant a fault, run tests, remove it, and return the tests that failed."""
    files = touched(patch)
    names = [name for name, file in checks.modules().items() if file in files]
    show = "import importlib.util as u, sys; print(*(u.find_spec(n).origin for n in sys.argv[1:]))"
    git = ["git", "-C", str(tree)]
    Path(variables[FAILED]).write_text("")
    subprocess.run([*git, "apply", str(patch)], check=True)
    try:
        for file in files:  # a compiled file of the same second and size would be taken for new
            shutil.rmtree((tree / file).parent / "__pycache__", ignore_errors=True)
        shown = subprocess.check_output(
            [sys.executable, "-c", show, *names], cwd=tree, env=variables, text=True
        )
        assert shown.split() == [str(tree / checks.modules()[name]) for name in names], shown
        options = ["-q", "--tb=no", "-p", "tests.planted.run", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, "-m", "not nightly", *tests]
        ended = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True)
        if ended.returncode not in (0, 1, 2):
            raise RuntimeError(
                f"{patch.name}: pytest ended with {ended.returncode}: {ended.stdout}"
            )
    finally:
        subprocess.run([*git, "checkout", "--quiet", "."], check=True)
        for file in files:
            shutil.rmtree((tree / file).parent / "__pycache__", ignore_errors=True)
    return sorted(set(Path(variables[FAILED]).read_text().splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="patches; all unless given")
    parser.add_argument("--files", action="store_true", help="run the whole files of these tests")
    parser.add_argument("--group", choices=[checks.GATE, *checks.GROUPS])
    parser.add_argument("--all", action="store_true", help="run all tests")
    parser.add_argument("--tests", nargs="+", default=[], help="run these, to fill in a header")
    asked = parser.parse_args()
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checks.ROOT, text=True).strip()
    names = asked.names or sorted(patch.stem for patch in HERE.glob("*.patch"))
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    lost = []
    with tempfile.TemporaryDirectory(prefix="m3i-planted-") as folder:
        scratch, tree = Path(folder), Path(folder) / "tree"
        git = ["git", "-C", str(checks.ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), head], check=True)
        try:
            (tree / ".venv").symlink_to(checks.ROOT / ".venv")
            variables = environment(tree, scratch)
            for number, name in enumerate(names, 1):
                patch = HERE / f"{name}.patch"
                fault, expected = header(patch)
                tests = asked.tests or [line.partition(" (")[0] for line in expected]
                if asked.files:
                    tests = sorted({test.partition("::")[0] for test in tests})
                if asked.group or asked.all:
                    tests = ["--group", asked.group] if asked.group else []
                state = f"{head} {patch.read_text()} {tests}"
                key = hashlib.sha256(state.encode()).hexdigest()[:16]
                if key not in kept:
                    found = find(patch, tests, tree, variables)
                    others = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
                    kept |= {**others, key: found}  # of a second run beside this one
                    KEPT.parent.mkdir(exist_ok=True)
                    KEPT.write_text(json.dumps(kept, indent=1))
                print(f"[{number}/{len(names)}] {name}: {fault}", flush=True)
                print(*(f"    {line}" for line in kept[key] or ["not found"]), sep="\n", flush=True)
                named = set(expected) <= set(kept[key])
                if not (kept[key] if asked.group or asked.tests else named):
                    lost.append(name)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    print(f"{len(names) - len(lost)} of {len(names)} faults found", flush=True)
    if lost:
        sys.exit(f"not found: {', '.join(lost)}")


if __name__ == "__main__":
    main()
