"""Checks of the fields of every config: their ranges, and what fields are held to together.

A range is given with a field's type, `depth: Annotated[int, DEPTHS] = 12`; a size past it would end
in an allocation that fails, a library that aborts, or hours before the first step. Conditions on
several fields are in the config's `conflicts`. Imports the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import cache
from numbers import Integral
from typing import Any, Literal, get_args, get_type_hints

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

_is_deferred: ContextVar[bool] = ContextVar("_is_deferred", default=False)


class Checked:
    """A base of configs that refuse wrong values when they are made.

    `__post_init__` raises ValueError for every number that is not finite or out of its range, and,
    where there is none, for every one of the config's own `conflicts`.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        if not _is_deferred.get():
            refuse([*self.wrong_numbers()] or self.conflicts(), self.place())

    def wrong_numbers(self) -> Iterable[Conflict]:
        """Yield the numbers that are not finite, or out of their range."""
        return out_of_range(self)

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
    wrong = cfg.wrong_numbers() if isinstance(cfg, Checked) else ()
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
    """Raise ValueError for the numbers that are not finite or out of their range.

    prefix: what the message puts before a field's name, "optim.".
    """
    refuse(out_of_range(cfg), prefix)


def out_of_range(cfg: Any) -> Iterator[Conflict]:
    """Yield the number fields of a dataclass that are not finite, or out of their range."""
    kind: type = type(cfg)
    for name, allowed in _ranges(kind).items():
        value = getattr(cfg, name)
        for number in value if isinstance(value, tuple) else (value,):
            told = _wrong(number, allowed)
            if told:
                shown = repr(value) if told == "a whole number" else value
                yield name, f"expected {told}, got {shown}"
                break


def _wrong(number: Any, allowed: range | None) -> str:
    """Return what was expected of a number that is wrong; an empty text for a right one."""
    if isinstance(number, float) and not math.isfinite(number):
        return "a finite number"
    if allowed is None or number is None:
        return ""
    if not isinstance(number, Integral):
        return "a whole number"
    return "" if int(number) in allowed else _told(allowed)


def mlp_ratio_conflicts(ratio: float) -> Iterator[Conflict]:
    """Yield what is wrong with the hidden width of an MLP over its input."""
    if not 0 < ratio <= MAX_RATIO:
        yield "mlp_ratio", f"expected 0 < ratio <= {MAX_RATIO}, got {ratio}"


def recompute_conflicts(value: object) -> Iterator[Conflict]:
    """Yield what is wrong with a way to checkpoint activations."""
    if value not in get_args(Recompute):
        yield (
            "activation_checkpointing",
            f"expected none, selective or full, got {value!r}",
        )


@cache
def _ranges(kind: type) -> dict[str, range | None]:
    """Return the range of each field, None where it has none."""
    hints = get_type_hints(kind, include_extras=True)
    ranges = {}
    for name in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        metadata = getattr(hints[name], "__metadata__", ())
        ranges[name] = next((each for each in metadata if isinstance(each, range)), None)
    return ranges


def _told(allowed: range) -> str:
    if allowed.stop == NUMBERS.stop:
        return f">= {allowed.start}"
    return f"{allowed.start} to {allowed.stop - 1}"
