"""Every field of a run's config, by the dataclasses' own types, defaults and docstrings.

The dataclasses are found from the one that a recipe returns on, through its type hints, wherever
their files are.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

UNBOUNDED = 2**63  # where a range of a field ends that has no end


@dataclasses.dataclass(frozen=True)
class Group:
    """A dataclass at one place of the config."""

    kind: type
    path: str
    """Such as data.local_views; "" of the root, objective.terms.N of each of several."""
    variant: str
    """Its name where a field may hold one of several dataclasses, else empty."""

    @property
    def title(self) -> str:
        if not self.path:
            return "The run"
        return f"`{self.path}`: {self.variant}" if self.variant else f"`{self.path}`"


def page() -> str:
    """Return the Markdown of all fields, a section a dataclass."""
    from m3i_fast.recipes import recipes

    return "\n".join(map(_group, groups(type(recipes()["demo"]()))))


def recipe_tables() -> str:
    """Return the Markdown of what the recipes change, a table a family of them."""
    from m3i_fast.objectives.methods import METHODS
    from m3i_fast.recipes import recipes

    made = {name: build() for name, build in recipes().items()}
    found = {name: cfg for name, cfg in made.items() if name.removeprefix("demo_") not in METHODS}
    return "\n".join(_tables(found, default=type(made["demo"])()))


def groups(root: type, path: str = "", variant: str = "") -> Iterator[Group]:
    """Yield the dataclasses of a config, each at every place where it stands."""
    yield Group(root, path, variant)
    for name, hint in _hints(root).items():
        nested = list(_nested(hint))
        place = f"{path}.{name}".lstrip(".") + (".N" if _is_sequence(hint) else "")
        for kind in nested:
            yield from groups(kind, place, _short(kind) if len(nested) > 1 else "")


def docstrings(kind: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, in one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found


# ---- Markdown ------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """Return a docstring's text as Markdown that shows it as it is; `code` stays code."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([\\*_<>\[\]{}|~#$])", r"\\\1", piece)
        for piece in pieces
    )


def _group(group: Group) -> str:
    lines = [f"## {group.title}\n"]
    about = inspect.getdoc(group.kind) or ""
    if about and not about.startswith(f"{group.kind.__name__}("):  # dataclass's own signature
        lines += [prose(about.partition("\n\n")[0]), ""]
    told, hints = docstrings(group.kind), _hints(group.kind)
    for field in dataclasses.fields(group.kind):
        if not _is_group(hints[field.name]):
            lines.append(_entry(group, field, hints[field.name], told.get(field.name, "")))
    return "\n".join(lines)


def _entry(group: Group, field: dataclasses.Field[Any], hint: Any, told: str) -> str:
    """A field as Sphinx's `confval`, which can be linked to and searched for."""
    mark = f" ({group.variant})" if group.variant else ""
    name = f"{group.path}.{field.name}".lstrip(".") + mark
    options = [f":type: {_type(hint)}", f":default: {_default(field)}"]
    return "\n".join([f":::{{confval}} {name}", *options, "", prose(told), ":::", ""])


def _tables(made: Mapping[str, Any], default: Any) -> Iterator[str]:
    """A table a family of recipes: its columns, by the name up to the size, and their values."""
    families: dict[str, list[str]] = {}
    for name in made:
        families.setdefault("_".join(name.split("_")[:2]), []).append(name)
    families["demo"] += families.pop("demo_internimage", [])
    for names in families.values():
        changed = {name: dict(changes(made[name], default)) for name in names}
        rows = list(dict.fromkeys(path for found in changed.values() for path in found))
        yield f"| field | default | {' | '.join(f'`{name}`' for name in names)} |"
        yield "| --- | --- |" + " --- |" * len(names)
        for path in rows:
            usual = next(found[path][0] for found in changed.values() if path in found)
            cells = [changed[name].get(path, ("", ""))[1] for name in names]
            yield f"| `{path}` | {usual} | {' | '.join(cells)} |"
        yield ""


def changes(cfg: Any, default: Any, path: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the path of each field that differs, with its default and its value."""
    for field in dataclasses.fields(cfg):
        value, usual = getattr(cfg, field.name), getattr(default, field.name, None)
        name = f"{path}.{field.name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            if type(usual) is not type(value):
                yield name, (_short(type(usual)) if usual else "none", _short(type(value)))
                usual = type(value)()
            yield from changes(value, usual, name)
        elif value != usual:
            yield name, (_value(usual), _value(value))


# ---- Types and values ----------------------------------------------------------------------------


def _hints(kind: type) -> dict[str, Any]:
    """Types of a dataclass's fields, with their annotations."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _nested(hint: Any) -> Iterator[type]:
    """Dataclasses that a field of this type may hold."""
    if dataclasses.is_dataclass(hint):
        yield hint
    elif get_origin(hint) is not Literal:
        for argument in get_args(hint):
            yield from _nested(argument)


def _is_sequence(hint: Any) -> bool:
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(plain) is tuple


def _is_group(hint: Any) -> bool:
    """Whether a field always holds a dataclass, whose fields then stand in its place."""
    can_be_none = type(None) in get_args(hint)
    return any(_nested(hint)) and not _is_sequence(hint) and not can_be_none


def _short(kind: type) -> str:
    return kind.__name__.removesuffix("Config")


def _type(hint: Any) -> str:
    """A type in words: its choices, its range."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        allowed = next((each for each in hint.__metadata__ if isinstance(each, range)), None)
        return _type(arguments[0]) + (f", {_range(allowed)}" if allowed is not None else "")
    if origin is Literal:
        return " or ".join(f"`{each}`" for each in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"any number of {_type(arguments[0])}"
        return "(" + ", ".join(map(_type, arguments)) + ")"
    return "none" if hint is type(None) else f"`{hint.__name__}`"


def _range(allowed: range) -> str:
    if allowed.stop == UNBOUNDED:
        return f"at least {allowed.start:,}"
    return f"{allowed.start:,} to {allowed.stop - 1:,}"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _value(field.default_factory())
    return "none: it has to be given"


def _value(value: Any) -> str:
    """A value as code; of several dataclasses their names, of text that is empty the word."""
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return ", ".join(f"`{each.name}`" for each in value)
    if value is None or value == "" or value == ():
        return "none" if value is None else "empty"
    if isinstance(value, float):
        return f"`{value:.6g}`"
    if isinstance(value, tuple):
        numbers = (f"{each:.6g}" if isinstance(each, float) else str(each) for each in value)
        return f"`({', '.join(numbers)})`"
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"
