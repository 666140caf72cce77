"""Which file defines a name: {where}`Term` becomes "Term in m3i_fast/...", and never goes stale.

A name is a class, a function or a constant of a module, or `Class.member`, as a config's field.
Where several modules define it, a part of the right one's path goes before it:
{where}`terms/labels:Caption`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("m3i_fast", "pipelines", "benchmarks")


@cache
def definitions() -> dict[str, list[str]]:
    """Return the files, from the repository's root on, that define each name."""
    found = defaultdict(list)
    for path in sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        for name in _names(ast.parse(path.read_text())):
            found[name].append(path.relative_to(ROOT).as_posix())
    return dict(found)


def file_of(name: str) -> str:
    """Return the one file that defines a name. ValueError where there is none, or several."""
    part, _, wanted = name.rpartition(":")
    files = [file for file in definitions().get(wanted, []) if part in file]
    if len(files) != 1:
        raise ValueError(
            f"{{where}}`{name}`: expected one file that defines {wanted}, got "
            f"{', '.join(files) or 'none'}"
        )
    return files[0]


def where(
    name: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any, **__: Any
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """Return the nodes of the role, or an error that the strict build ends with."""
    try:
        file = file_of(text)
    except ValueError as error:
        problem = inliner.reporter.error(str(error), line=lineno)
        return [], [problem]
    wanted = text.rpartition(":")[2]
    shown = [nodes.literal(text=wanted), nodes.Text(" in "), nodes.literal(text=file)]
    return shown, []


def _names(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines, and `Class.member` of its classes."""
    for statement in tree.body:
        for name in _bound(statement):
            yield name
            if isinstance(statement, ast.ClassDef):
                for member in statement.body:
                    yield from (f"{name}.{each}" for each in _bound(member))


def _bound(statement: ast.stmt) -> list[str]:
    """Names that a definition or an assignment binds."""
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            return [name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=targets):
            return [each.id for each in targets if isinstance(each, ast.Name)]
    return []
