"""A row's check against row.schema.json, by the keywords of JSON Schema that the file uses.

Every row passes it before it is written, also where no validator is installed; the tests hold it
to the verdicts of the package jsonschema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("row.schema.json")
NOTES = {"$schema", "title", "description"}
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@cache
def schema() -> dict[str, Any]:
    rules: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return rules


def complaints(value: Any, rules: dict[str, Any] | None = None, where: str = "") -> Iterator[str]:
    """Yield what is wrong with a row, a line each: the place, what was expected, what is there."""
    rules = schema() if rules is None else rules
    place = where or "the row"
    if "type" in rules:
        names = rules["type"] if isinstance(rules["type"], list) else [rules["type"]]
        if not any(_is(value, name) for name in names):
            yield f"{place}: expected {' or '.join(names)}, got {_short(value)}"
            return
    for keyword, expected in rules.items():
        if keyword in CHECKS:
            holds, words = CHECKS[keyword]
            if not holds(value, expected):
                yield f"{place}: expected {words} {expected}, got {_short(value)}"
        elif keyword not in NESTED | NOTES | {"type"}:
            raise ValueError(f"{FILE.name}: the keyword {keyword} is not known here")
    if isinstance(value, dict):
        yield from _of_members(value, rules, where)
    if isinstance(value, list) and "items" in rules:
        for index, item in enumerate(value):
            yield from complaints(item, rules["items"], f"{where}[{index}]")


NESTED = {"properties", "additionalProperties", "required", "items"}
CHECKS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "const": (lambda value, expected: bool(value == expected), "the value"),
    "minimum": (
        lambda value, least: not isinstance(value, int | float) or bool(value >= least),
        "at least",
    ),
    "minLength": (
        lambda value, least: not isinstance(value, str) or len(value) >= least,
        "a length of at least",
    ),
    "pattern": (
        lambda value, pattern: not isinstance(value, str) or bool(re.search(pattern, value)),
        "a text like",
    ),
}


def _of_members(value: dict[str, Any], rules: dict[str, Any], where: str) -> Iterator[str]:
    prefix = f"{where}." if where else ""
    properties = rules.get("properties", {})
    for name in rules.get("required", ()):
        if name not in value:
            yield f"{prefix}{name}: expected a value, got none"
    others = rules.get("additionalProperties", True)
    for name, member in value.items():
        if name in properties:
            yield from complaints(member, properties[name], f"{prefix}{name}")
        elif others is False:
            yield f"{prefix}{name}: expected one of {', '.join(properties)}"
        elif others is not True:
            yield from complaints(member, others, f"{prefix}{name}")


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):  # as JSON Schema: 1.0 is an integer
        return value.is_integer()
    return isinstance(value, TYPES[name])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
