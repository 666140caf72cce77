"""Groups of tests: which cases stay at the gate, and which files a group may read."""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterable
from typing import Any

import pytest

from scripts import checks


def at_gate(gate: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Return the cases; those that are not at the gate belong to the group of matrices."""
    return [case if case in gate else in_matrix(case) for case in cases]


def in_matrix(case: Any) -> Any:
    """Return a case as one of the group of matrices; a tuple has a value for each argument."""
    return pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.matrix)


class InputsOnly:
    """Fails a test that opens or imports a file of the repository that is no input of its group.

    Otherwise a change of that file would not make the group stale.
    """

    def __init__(self, group: str) -> None:
        self.group = group
        self.others = checks.tracked() - checks.input_files(group) - {"scripts/checks.py"}
        for name in checks.GROUPS:
            checks.test_files(name)  # reads all tests, and keeps what it found
        self.opened: set[str] = set()
        self.root = f"{checks.ROOT}/"
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[object, ...]) -> None:
        """Note a file that Python opens."""
        if event == "open" and isinstance(arguments[0], str):
            self.opened.add(arguments[0])

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        loaded = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        names = {os.path.abspath(path).removeprefix(self.root) for path in {*self.opened, *loaded}}
        self.opened.clear()
        if wrong := sorted(names & self.others):
            self.others -= {*wrong}  # once
            pytest.fail(f"group {self.group} in scripts/checks.py: add to `reads` {wrong}")
