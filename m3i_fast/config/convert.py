"""Conversion of configs to JSON objects and back, with no silent change and all errors at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.gen import make_dict_structure_fn
from cattrs.v import format_exception

from m3i_fast.config.data import LoaderConfig
from m3i_fast.config.fields import all_conflicts, deferred_checks
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.objective import Term
from m3i_fast.config.objective.targets import LABELS

T = TypeVar("T")


def to_tree(cfg: Any) -> dict[str, Any]:
    """Return a config as a JSON object."""
    tree: dict[str, Any] = _converter.unstructure(cfg)
    return tree


def from_tree(kind: type[T], tree: dict[str, Any], where: str) -> T:
    """Return the config of a JSON object that `to_tree` wrote.

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
    conflicts = [f"{path}: {told}" for path, told in all_conflicts(cfg)]
    if conflicts:
        raise ValueError(f"{where}: " + "; ".join(conflicts))
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
    """Read the encoder's config, whose class follows from a field that only InternImage's has."""
    if "channels" in value:
        return _converter.structure(value, InternImageConfig)
    return _converter.structure(value, ViTConfig)


def _term(value: dict[str, Any], _: Any) -> Term:
    """Read a term; a label term without a mean has that over members, once the only one."""
    if isinstance(value, dict) and value.get("target") in LABELS:
        value = {"mean": "members"} | value
    return _structure_term(value, Term)


def _loader(value: dict[str, Any], _: Any) -> LoaderConfig:
    """Read what is loaded; the size of a shuffle buffer, which older configs have, is left out."""
    if isinstance(value, dict):
        value = {key: value[key] for key in value if key != "initial_fill"}
    return _structure_loader(value, LoaderConfig)


def _reason(error: BaseException, kind: type | None) -> str:
    """Return the text of a config's error, or cattrs' for fields that are missing or unknown."""
    if isinstance(error, (KeyError, TypeError, AttributeError, cattrs.ForbiddenExtraKeysError)):
        return format_exception(error, kind)
    return str(error)


def _only(kind: type, expected: str, *others: type) -> Callable[[Any, Any], Any]:
    """Return a hook that takes values of this type alone; cattrs would make 3 of 3.7."""

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
_structure_loader = make_dict_structure_fn(LoaderConfig, _converter)
_converter.register_structure_hook(LoaderConfig, _loader)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))
