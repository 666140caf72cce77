"""JSON that may be damaged, or written by something else: parsed, and held to a shape.

A shape is a type; a tuple of shapes, of which one must fit; [shape], a list of such values; or a
mapping: {"name": shape, "name?": shape} is an object that has the first name and may have the
second. Further names are allowed, and {str: shape} gives the shape of their values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3i_fast.durable_files import read_file

OPTIONAL = "?"
_NAMES: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    None: "null",
}


def read_json(path: Path, shape: Any = dict) -> Any:
    """Read a file of JSON; ValueError names the file and what is wrong with it.

    Raises FileNotFoundError where there is none.
    """
    return parse_json(read_file(path), shape, str(path))


def parse_json(text: bytes, shape: Any, where: str) -> Any:
    """Parse JSON and return it if it has the shape; ValueError begins with `where` otherwise."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: damaged: objects and lists are nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: damaged: {error}") from None
    if wrong := misfit(value, shape):
        raise ValueError(f"{where}: damaged: {wrong}")
    return value


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Say where a value departs from a shape, what was expected and what is there."""
    if isinstance(shape, tuple):
        fits = any(misfit(value, option) is None for option in shape)
        return None if fits else _expected(shape, value, place)
    kind = type(shape) if isinstance(shape, list | dict) else shape
    if not _is(value, kind):
        return _expected(kind, value, place)
    if isinstance(shape, dict):
        return _misfit_of_members(value, shape, f"{place}." if place else "")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            if wrong := misfit(item, shape[0], f"{place}[{index}]"):
                return wrong
    return None


def _misfit_of_members(value: dict[str, Any], shape: dict[Any, Any], prefix: str) -> str | None:
    named = {name.removesuffix(OPTIONAL): name for name in shape if name is not str}
    for name, key in named.items():
        if name not in value and not key.endswith(OPTIONAL):
            return f"{prefix}{name}: expected {_name(shape[key])}, got nothing"
    for name, member in value.items():
        key = named.get(name, str)
        if key in shape and (wrong := misfit(member, shape[key], f"{prefix}{name}")):
            return wrong
    return None


def _is(value: Any, kind: Any) -> bool:
    """As in JSON an integer is a number, and true and false are none."""
    if kind is None:
        return value is None
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _expected(shape: Any, value: Any, place: str) -> str:
    text = repr(value) if isinstance(value, int | float | str | None) else _NAMES[type(value)]
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{place}: " * bool(place) + f"expected {_name(shape)}, got {text}"


def _name(shape: Any) -> str:
    if isinstance(shape, tuple):
        return " or ".join(dict.fromkeys(map(_name, shape)))
    return _NAMES[shape if shape is None or isinstance(shape, type) else type(shape)]
