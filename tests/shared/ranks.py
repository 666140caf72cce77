"""A rank's part of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from m3i_fast.pipelines.batch import Batch


def part(batch: Batch, rank: int, num_ranks: int) -> Batch:
    """A rank's rows."""

    def rows(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(rows, value))
        if isinstance(value, Mapping):
            return {name: rows(values) for name, values in value.items()}
        size = len(value) // num_ranks
        return value[rank * size : (rank + 1) * size]

    return Batch(**{field.name: rows(getattr(batch, field.name)) for field in fields(Batch)})
