"""A batch of several ranks, and the one process's batch that it is a part of."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from m3i_fast.objectives.mixing import Mix
from m3i_fast.pipelines.batch import Batch


def part(batch: Batch, rank: int, num_ranks: int) -> Batch:
    """A rank's rows."""

    def rows(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(rows, value))
        size = len(value) // num_ranks
        return value[rank * size : (rank + 1) * size]

    return Batch(**{field.name: rows(getattr(batch, field.name)) for field in fields(Batch)})


def joined(mixes: list[Mix]) -> Mix:
    """One process's inputs: those of all ranks; images by place in the input, then by rank.

    Every input is to be asked: those asked are a step's first, which of a rank they are not here.
    """
    num_images = mixes[0].members.shape[1]
    batch_size = len(mixes[0].token_priority)

    def by_image(name: str, offset: int = 0) -> Tensor:
        parts = [
            (getattr(mix, name) + offset * rank).unflatten(0, (num_images, -1))
            for rank, mix in enumerate(mixes)
        ]
        return torch.cat(parts, 1).flatten(0, 1)

    return replace(
        mixes[0],
        members=torch.cat([mix.members + batch_size * rank for rank, mix in enumerate(mixes)]),
        choice=torch.cat([mix.choice for mix in mixes]),
        sample=by_image("sample", batch_size),
        token_index=by_image("token_index"),
        own_query=by_image("own_query"),
        other_query=by_image("other_query"),
        token_priority=torch.cat([mix.token_priority for mix in mixes]),
        num_asked=sum(mix.num_asked for mix in mixes),
    )
