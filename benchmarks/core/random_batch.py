"""Random batches of a config's shapes, to measure or test a step without a loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config import TextConfig, TrainConfig
from m3i_fast.config.columns import NO_CLASS, ColumnConfig
from m3i_fast.pipelines.batch import Batch

MIN_TOKENS = 5


def draw_batch(cfg: TrainConfig, *, seed: int = 0) -> Batch:
    """Draw a rank's batch on the CPU; every picture has a label, a caption, a group of its own.

    Views are crops of an upright square as large as a global one, some of them mirrored.
    """
    rng = torch.Generator().manual_seed(seed)
    data, size, text = cfg.data, cfg.vision.image_size, cfg.text
    count, local = data.batch_size, data.local_views

    def views(side: int, number: int) -> tuple[Tensor, ...]:
        shape = count, 3, side, side
        return tuple(
            torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8) for _ in range(number)
        )

    global_views = views(data.global_views.size, data.global_views.count)
    local_views = views(local.size, local.count) if local is not None else ()
    num_views = len(global_views) + len(local_views)
    corner = torch.rand(count, num_views, 2, generator=rng) * 0.3 * size
    side = (0.4 + 0.3 * torch.rand(count, num_views, 2, generator=rng)) * size
    flip = torch.randint(0, 2, (count, num_views, 1), generator=rng).float()
    fewest = min(MIN_TOKENS, text.context_length)
    num_tokens = torch.randint(fewest, text.context_length + 1, (count,), generator=rng)
    ids = torch.randint(
        1, text.vocab_size, (count, text.context_length), generator=rng, dtype=torch.int32
    )
    ids[torch.arange(text.context_length) >= num_tokens[:, None]] = 0
    return Batch(
        global_views=global_views,
        local_views=local_views,
        boxes=torch.cat([corner, side, flip], -1),
        image_size=torch.full((count, 2), float(size)),
        token_ids=ids,
        num_tokens=num_tokens,
        label=torch.randint(0, max(cfg.num_classes, 1), (count,), generator=rng),
        sample_id=torch.arange(count),
        group_id=torch.arange(count),
        position=torch.arange(count),
        columns={column.name: _column(column, count, text, rng) for column in cfg.columns},
    )


def _column(column: ColumnConfig, count: int, text: TextConfig, rng: torch.Generator) -> Tensor:
    """Return values of a named column, which every sample has."""
    if column.kind == "numbers":
        return torch.randn(count, column.size, generator=rng)
    if column.kind == "text":
        shape = count, column.size
        return torch.randint(1, text.vocab_size, shape, generator=rng, dtype=torch.int32)
    first = torch.randint(0, column.num_names, (count,), generator=rng)
    if column.kind == "class":
        return first
    return torch.nn.functional.pad(first[:, None], (0, column.size - 1), value=NO_CLASS)


class Repeated:
    """A loader that returns one batch again and again."""

    samples = 0  # the batch begins the run each time

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._batch

    def close(self) -> None:
        """Do nothing: no file is open."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None:
        """Do nothing: every batch is the same."""
