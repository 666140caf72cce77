"""What the number fields of every config are held to. Only the standard library is imported here.

A range is given with a field's type, `depth: Annotated[int, DEPTHS] = 12`; a size past it would end
in an allocation that fails, a library that aborts, or hours before the first step.
"""

from __future__ import annotations

import math
from functools import cache
from numbers import Integral
from typing import Any, get_type_hints

NUMBERS = range(2**63)  # seeds, and steps between two events: they size nothing
COUNTS = range(1, 2**63)
WIDTHS = range(1, 2**16 + 1)  # features: a matrix of 65,536 squared takes 16 GiB
DEPTHS = range(1, 2**10 + 1)  # layers, which are built one after another
ROWS = range(2**24 + 1)  # of a table: at 512 features 32 GiB
SOME_ROWS = range(1, ROWS.stop)
SIDES = range(1, 2**13 + 1)  # pixels: an RGB image of 8,192 squared takes 192 MiB
LEVELS = range(256)  # of a colour in 8 bits
BATCHES = range(1, 2**16 + 1)  # samples of a batch, or batches of a step, on one rank
STEPS = range(1, 5 * 10**7 + 1)  # schedules are arrays of this length: 0.4 GiB each
THREADS = range(1, 2**10 + 1)  # twice those of the largest nodes
MAX_RATIO = 64.0  # hidden width of an MLP over its input


def check_fields(cfg: Any, prefix: str = "") -> None:
    """Raise ValueError for the first field whose number is not finite, or out of its range.

    Every config calls it first in __post_init__, so that comparisons after it never see a NaN.
    prefix: what the message puts before the field's name, "optim.".
    """
    for name, allowed in _ranges(type(cfg)).items():  # type: ignore[arg-type]
        value = getattr(cfg, name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{name}: expected a finite number, got {value}")
            if allowed is None or number is None:
                continue
            if not isinstance(number, Integral):
                raise ValueError(f"{prefix}{name}: expected a whole number, got {value!r}")
            if int(number) not in allowed:
                raise ValueError(f"{prefix}{name}: expected {_told(allowed)}, got {value}")


@cache
def _ranges(kind: type) -> dict[str, range | None]:
    """The range of each field, None where it has none."""
    hints = get_type_hints(kind, include_extras=True)
    found = {}
    for name in kind.__dataclass_fields__:  # type: ignore[attr-defined]
        metadata = getattr(hints[name], "__metadata__", ())
        found[name] = next((each for each in metadata if isinstance(each, range)), None)
    return found


def _told(allowed: range) -> str:
    if allowed.stop == NUMBERS.stop:
        return f">= {allowed.start}"
    return f"{allowed.start} to {allowed.stop - 1}"
