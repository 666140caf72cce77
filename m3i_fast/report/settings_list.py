"""Nested settings as the lines of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as `a.b.c` and their text; items of a list go by their name."""
    for key, value in tree.items():
        if isinstance(value, Sequence) and value and all(isinstance(v, Mapping) for v in value):
            value = {item.get("name", str(i)): item for i, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", setting_text(value)


def setting_text(value: Any) -> str:
    """Format a value: `0.707107` for a float, `none`, `true`, `0.9, 0.98` for a list."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(setting_text, value))
    return str(value)
