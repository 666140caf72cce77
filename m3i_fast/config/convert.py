"""Configs to JSON's objects and back: nothing is converted silently, and every error is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from m3i_fast.config.fields import all_conflicts, deferred_checks
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective import LABELS, Term

T = TypeVar("T")


def to_tree(cfg: Any) -> dict[str, Any]:
    """Return a config as an object of JSON."""
    tree: dict[str, Any] = _converter.unstructure(cfg)
    return tree


def from_tree(kind: type[T], tree: dict[str, Any], where: str) -> T:
    """Return the config that `to_tree` made the object of.

    Raises ValueError, which begins with `where` and names every field that is unknown, missing, of
    another type, out of its range or in conflict with others.
    """
    try:
        with deferred_checks():
            cfg = _converter.structure(tree, kind)
    except (cattrs.BaseValidationError, ValueError, TypeError) as error:
        reasons = (
            cattrs.transform_error(error, path="config", format_exception=_reason)
            if isinstance(error, cattrs.BaseValidationError)
            else [str(error)]
        )
        raise ValueError(f"{where}: " + "; ".join(reasons)) from None
    found = [f"{path}: {told}" for path, told in all_conflicts(cfg)]
    if found:
        raise ValueError(f"{where}: " + "; ".join(found))
    return cfg


def differences(a: Any, b: Any) -> list[str]:
    """Return the fields in which two configs differ, as "path: a != b"."""
    return _differences("", to_tree(a), to_tree(b))


def _differences(path: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [
            line
            for key in keys
            for line in _differences(f"{path}.{key}" if path else key, a.get(key), b.get(key))
        ]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]


_converter = cattrs.Converter(forbid_extra_keys=True)


def _vision_config(value: dict[str, Any], _: Any) -> VisionConfig:
    """Told by a field that only one of them has, and no config lacks."""
    if "channels" in value:
        return _converter.structure(value, InternImageConfig)
    return _converter.structure(value, ViTConfig)


def _term(value: dict[str, Any], _: Any) -> Term:
    """Read a label term that names no mean as what it was: over the members, once the only mean."""
    if isinstance(value, dict) and value.get("target") in LABELS:
        value = {"mean": "members"} | value
    return _structure_term(value, Term)


def _reason(error: BaseException, kind: type | None) -> str:
    """The text of what a config raises; cattrs's own for what is missing, unknown or no object."""
    if isinstance(error, (KeyError, TypeError, AttributeError, cattrs.ForbiddenExtraKeysError)):
        return format_exception(error, kind)
    return str(error)


def _only(kind: type, expected: str, *others: type) -> Callable[[Any, Any], Any]:
    """Take values of this type (cattrs would make 3 of 3.7, and True of "false")."""

    def structure(value: Any, _: Any) -> Any:
        if type(value) not in (kind, *others):
            raise ValueError(f"expected {expected}, got {value!r}")
        return kind(value)

    return structure


_converter.register_structure_hook(bool, _only(bool, "true or false"))
_converter.register_structure_hook(int, _only(int, "a whole number"))
_converter.register_structure_hook(float, _only(float, "a number", int))
_converter.register_structure_hook(str, _only(str, "text"))
_converter.register_structure_hook(VisionConfig, _vision_config)
_structure_term = make_dict_structure_fn(Term, _converter)
_converter.register_structure_hook(Term, _term)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
