"""Who of the tests may import whom: a folder its own files and tests.shared, which stays small."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

TESTS = Path(__file__).parent
MODULES = {
    ".".join(path.relative_to(TESTS.parent).with_suffix("").parts): path.relative_to(TESTS)
    for path in sorted(TESTS.rglob("*.py"))
}


def used_by(module: str) -> set[str]:
    """Modules of tests that it imports, also inside functions."""
    tree = ast.parse((TESTS / MODULES[module]).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names & MODULES.keys()


USES = {module: used_by(module) for module in MODULES if not module.endswith(".__init__")}


def folder(module: str) -> str:
    return PurePosixPath(MODULES[module]).parent.as_posix()


def test_a_folder_imports_itself_and_what_is_shared() -> None:
    wrong = {
        f"{MODULES[module]} imports {used}"
        for module, names in USES.items()
        for used in names
        if not module.endswith(".conftest")
        and folder(used) != folder(module)
        and not used.startswith("tests.shared.")
    }
    assert not wrong, sorted(wrong)


def test_no_folder_is_crowded() -> None:
    sizes = Counter(path.parent for path in MODULES.values())
    assert sum(sizes.values()) > 200
    assert {str(room): size for room, size in sizes.items() if size > 15} == {}


def test_imports_have_no_cycle() -> None:
    TopologicalSorter(USES).prepare()


def test_what_is_shared_is_used_by_more_than_one_folder() -> None:
    folders: dict[str, set[str]] = defaultdict(set)
    for module, names in USES.items():
        for used in names:
            folders[used].add(folder(module))
    shared = {name for name in USES if name.startswith("tests.shared.") and ".test_" not in name}
    assert shared
    alone = {name: sorted(folders[name]) for name in shared if len(folders[name]) < 2}
    assert not alone, f"{alone}: move each beside the tests that import it"
