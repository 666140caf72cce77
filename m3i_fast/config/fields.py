"""Checks of the fields of every config: types, ranges, and what fields are held to together.

A range is given with a field's type, `depth: Annotated[int, DEPTHS] = 12`; a size past it would end
in an allocation that fails, a library that aborts, or hours before the first step. Conditions on
several fields are in the config's `conflicts`. Imports the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NUMBERS = range(2**63)  # seeds, and steps between two events: they size nothing
COUNTS = range(1, 2**63)
WIDTHS = range(1, 2**16 + 1)  # features: a matrix of 65,536 squared takes 16 GiB
DEPTHS = range(1, 2**10 + 1)  # layers, which are built one after another
ROWS = range(2**24 + 1)  # of a table: at 512 features 32 GiB
SOME_ROWS = range(1, ROWS.stop)
SIDES = range(1, 2**13 + 1)  # pixels: an RGB image of 8,192 squared takes 192 MiB
LEVELS = range(256)  # of a colour in 8 bits
BATCHES = range(1, 2**16 + 1)  # samples of a batch, or batches of a step, on one rank
TOKENS = range(2**22 + 1)  # of a batch: 4 million of 1,024 features take 8 GiB in bf16, each layer
STEPS = range(1, 5 * 10**7 + 1)  # schedules are arrays of this length: 0.4 GiB each
THREADS = range(1, 2**10 + 1)  # twice those of the largest nodes
MAX_RATIO = 64.0  # hidden width of an MLP over its input

Conflict = tuple[str, str]
"""A field's name, or its path from the config on, and a text: what was expected, what was got."""

DropPathMode = Literal["mask", "subset"]
Gelu = Literal["gelu", "gelu_tanh", "quick_gelu"]
Mlp = Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Recompute = Literal["none", "selective", "full"]

_ABSTRACT = {int: Integral, float: Real}  # True is no number
_IN_WORDS: dict[Any, str] = {
    **{bool: "True or False", int: "a whole number", float: "a number", str: "text"},
    **{Path: "a pathlib.Path", type(None): "None"},
}

_is_deferred: ContextVar[bool] = ContextVar("_is_deferred", default=False)


class Checked:
    """A base of configs that refuse wrong values when they are made.

    `__post_init__` raises ValueError for every field of another type than its own and every number
    that is not finite or out of its range, and, where there is none, for every one of the config's
    own `conflicts`.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        if not _is_deferred.get():
            refuse([*self.wrong_values()] or self.conflicts(), self.place())

    def wrong_values(self) -> Iterable[Conflict]:
        """Yield the fields of another type, and numbers that are not finite or out of range."""
        return wrong_fields(self)

    def conflicts(self) -> Iterable[Conflict]:
        """Yield what is wrong with fields whose numbers are finite and in their ranges."""
        return ()

    def place(self) -> str:
        """Return what stands before a field's name in an error of this config alone: "optim."."""
        return ""


def refuse(conflicts: Iterable[Conflict], place: str = "") -> None:
    """Raise one ValueError for all of the conflicts; none raises nothing."""
    messages = [f"{place}{name}: {told}" for name, told in conflicts]
    if messages:
        raise ValueError("; ".join(messages))


def unmet(cfg: Any, **rules: tuple[bool, str]) -> Iterator[Conflict]:
    """Yield the fields whose rule does not hold: name = (whether it holds, what is expected)."""
    for name, (holds, expected) in rules.items():
        if not holds:
            yield name, f"expected {expected}, got {getattr(cfg, name)}"


@contextmanager
def deferred_checks() -> Iterator[None]:
    """Let configs be made of any values, for a caller that calls `all_conflicts` afterwards."""
    token = _is_deferred.set(True)
    try:
        yield
    finally:
        _is_deferred.reset(token)


def all_conflicts(cfg: Any) -> list[Conflict]:
    """Return everything that is wrong with a config and the configs in it, by path from it on.

    Conflicts of several fields are computed only where all numbers are in their ranges.
    """
    return _walk(cfg, "")[1]


def _walk(cfg: Any, path: str) -> tuple[bool, list[Conflict]]:
    """Return whether all numbers are in their ranges, and the conflicts."""
    wrong = cfg.wrong_values() if isinstance(cfg, Checked) else ()
    conflicts = [(f"{path}{name}", told) for name, told in wrong]
    is_sound = not conflicts
    for name in cfg.__dataclass_fields__:
        value = getattr(cfg, name)
        parts = enumerate(value) if isinstance(value, tuple) else ()
        for key, each in [(f"{name}.{i}", each) for i, each in parts] or [(name, value)]:
            if is_dataclass(each):
                inside, more = _walk(each, f"{path}{key}.")
                is_sound, conflicts = is_sound and inside, conflicts + more
    if is_sound and isinstance(cfg, Checked):
        conflicts += [(f"{path}{name}", told) for name, told in cfg.conflicts()]
    return is_sound, conflicts


def check_at_least(command: Any, **least: int) -> None:
    """Raise ValueError for a number of a command that is below the least of its flag."""
    for name, number in least.items():
        got = getattr(command, name)
        if got is not None and got < number:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected at least {number}, got {got}")


def check_fields(cfg: Any, prefix: str = "") -> None:
    """Raise ValueError for fields of another type, and numbers not finite or out of range.

    prefix: what the message puts before a field's name, "optim.".
    """
    refuse(wrong_fields(cfg), prefix)


def wrong_fields(cfg: Any) -> Iterator[Conflict]:
    """Yield the fields of a dataclass of another type than theirs, not finite or out of range."""
    kind: type = type(cfg)
    for name, (hint, allowed) in _fields(kind).items():
        value = getattr(cfg, name)
        if not _fits(value, hint):
            yield name, f"expected {' or '.join(_names(hint))}, got {value!r}"
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if told := _wrong(number, allowed):
                yield name, f"expected {told}, got {value}"
                break


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is of a field's type, as far as it is one that configs have."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, member) for member in members)
    if origin is Literal:
        return value in members
    if origin is tuple:
        if members[-1] is Ellipsis:
            members = (members[0],) * len(value) if isinstance(value, tuple) else ()
        return (
            isinstance(value, tuple)
            and len(value) == len(members)
            and all(map(_fits, value, members))
        )
    if hint in _ABSTRACT:
        return isinstance(value, _ABSTRACT[hint]) and not isinstance(value, bool)
    return not isinstance(hint, type) or origin is not None or isinstance(value, hint)


def _names(hint: Any) -> list[str]:
    """Return what a field may be, in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [name for member in members for name in _names(member)]
    if origin is Literal:
        return [repr(member) for member in members]
    if origin is tuple:
        length = "" if members[-1] is Ellipsis else f"{len(members)} of "
        return [f"a tuple of {length}{' or '.join(_names(members[0]))}"]
    return [_IN_WORDS.get(hint, getattr(hint, "__name__", str(hint)))]


def _wrong(number: Any, allowed: range | None) -> str:
    """Return what was expected of a number that is wrong; an empty text for a right one."""
    if isinstance(number, float) and not math.isfinite(number):
        return "a finite number"
    if allowed is None or number is None:
        return ""
    return "" if int(number) in allowed else _told(allowed)


def mlp_ratio_conflicts(ratio: float) -> Iterator[Conflict]:
    """Yield what is wrong with the hidden width of an MLP over its input."""
    if not 0 < ratio <= MAX_RATIO:
        yield "mlp_ratio", f"expected 0 < ratio <= {MAX_RATIO}, got {ratio}"


def expect_depth(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the arguments of a model of timm ask for too many layers to build."""
    for key in {"depth", "depths", "layers"} & arguments.keys():
        given = arguments[key] if isinstance(arguments[key], list) else [arguments[key]]
        if wrong := [number for number in given if type(number) is int and number not in DEPTHS]:
            raise ValueError(
                f"{name}: expected {key} of 1 to {DEPTHS.stop - 1}, got {wrong[0]}; if you trust "
                "the folder, raise m3i_fast.config.fields.DEPTHS"
            )


@cache
def _fields(kind: type) -> dict[str, tuple[Any, range | None]]:
    """Return the type of each field, and the range of its number, None where it has none."""
    plain, hints = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    return {
        name: (
            plain[name],
            next(
                (r for r in getattr(hints[name], "__metadata__", ()) if isinstance(r, range)), None
            ),
        )
        for name in kind.__dataclass_fields__  # type: ignore[attr-defined]
    }


def _told(allowed: range) -> str:
    if allowed.stop == NUMBERS.stop:
        return f">= {allowed.start}"
    return f"{allowed.start} to {allowed.stop - 1}"
