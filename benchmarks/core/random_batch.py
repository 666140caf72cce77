"""Random batches of a config's shapes, to measure or test a step without a loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config import TextConfig, TrainConfig
from m3i_fast.config.columns import NO_CLASS, REGION_TOKENS, REGION_UNIT, ColumnConfig
from m3i_fast.config.data import ViewConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.pipelines.any_shape.batch import AnyBatch, PackedBatch
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.sample_order.token_budget import TokenBudget, ViewSides, grid_of

MIN_TOKENS = 5


def draw_batch(cfg: TrainConfig, *, seed: int = 0) -> Batch:
    """Draw a rank's batch on the CPU; every picture has a label, a caption, a group of its own.

    Views are crops of an upright square as large as a global one, some of them mirrored. Raises
    ValueError for a budget of tokens, of which `draw_any_batch` draws a batch.
    """
    if cfg.data.any_shape:
        raise ValueError(
            "data.max_tokens_per_batch: expected 0 for a batch of squares, got "
            f"{cfg.data.max_tokens_per_batch}"
        )
    rng = torch.Generator().manual_seed(seed)
    data = cfg.data
    count, local = data.batch_size, data.local_views

    def views(side: int, number: int) -> tuple[Tensor, ...]:
        shape = count, 3, side, side
        return tuple(
            torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8) for _ in range(number)
        )

    global_views = views(data.global_views.size, data.global_views.count)
    local_views = views(local.size, local.count) if local is not None else ()
    return Batch(
        global_views=global_views,
        local_views=local_views,
        **_beside_views(cfg, count, len(global_views) + len(local_views), rng),
    )


def draw_any_batch(cfg: TrainConfig, *, seed: int = 0) -> AnyBatch:
    """Draw a rank's batch of the config: of squares, or of as many views as a budget holds.

    Of a budget it is the first batch of a run of that seed; aspects are uniform in their logarithm
    within those of the views' crops.
    """
    data = cfg.data
    if not data.any_shape:
        return draw_batch(cfg, seed=seed)
    assert isinstance(cfg.vision, ViTConfig)  # any_shape_conflicts
    patch_size = cfg.vision.patch_size
    sides, local_sides = data.patch_sides(patch_size)
    views = [(data.global_views, ViewSides(*sides))] * data.global_views.count
    if data.local_views is not None and local_sides is not None:
        views += [(data.local_views, ViewSides(*local_sides))] * data.local_views.count
    budget = TokenBudget(
        tokens=data.max_tokens_per_batch,
        views=tuple(own for _, own in views),
        seed=seed,
        images_per_input=cfg.objective.mixing.images_per_input,
    )
    most = budget.most_tokens(budget.positions(0, 0)).tolist()
    rng = torch.Generator().manual_seed(seed)
    grids = torch.tensor(
        [
            [
                grid_of(*_region(view, rng), number)
                for (view, _), number in zip(views, own, strict=True)
            ]
            for own in most
        ]
    )
    size = 3 * patch_size**2
    return PackedBatch(
        patches=tuple(
            torch.randint(0, 256, (int(own), size), generator=rng, dtype=torch.uint8)
            for own in grids.prod(2).sum(0)
        ),
        grids=grids,
        num_global=data.global_views.count,
        **_beside_views(cfg, len(most), len(views), rng),
    )


def _region(view: ViewConfig, rng: torch.Generator) -> tuple[float, float]:
    """Draw the height and width of a crop."""
    low, high = map(math.log, view.ratio)
    drawn = float(torch.rand((), generator=rng))
    return 1.0, math.exp(low + (high - low) * drawn)


def _beside_views(
    cfg: TrainConfig, count: int, num_views: int, rng: torch.Generator
) -> dict[str, Any]:
    """Draw the fields that a batch has beside its views, by name."""
    text, size = cfg.text, cfg.vision.image_size
    corner = torch.rand(count, num_views, 2, generator=rng) * 0.3 * size
    side = (0.4 + 0.3 * torch.rand(count, num_views, 2, generator=rng)) * size
    flip = torch.randint(0, 2, (count, num_views, 1), generator=rng).float()
    fewest = min(MIN_TOKENS, text.context_length)
    num_tokens = torch.randint(fewest, text.context_length + 1, (count,), generator=rng)
    ids = torch.randint(
        1, text.vocab_size, (count, text.context_length), generator=rng, dtype=torch.int32
    )
    ids[torch.arange(text.context_length) >= num_tokens[:, None]] = 0
    return {
        "boxes": torch.cat([corner, side, flip], -1),
        "image_size": torch.full((count, 2), float(size)),
        "token_ids": ids,
        "num_tokens": num_tokens,
        "label": torch.randint(0, max(cfg.num_classes, 1), (count,), generator=rng),
        "sample_id": torch.arange(count),
        "group_id": torch.arange(count),
        "position": torch.arange(count),
        "columns": {
            column.name: _regions(count, num_views, cfg.data.max_regions, text, rng)
            if column.kind == "regions"
            else _column(column, count, text, rng)
            for column in cfg.columns
        },
    }


def _regions(
    count: int, num_views: int, most: int, text: TextConfig, rng: torch.Generator
) -> Tensor:
    """Draw as many regions as a view may have, with texts as long as a region's may be."""
    shape = count, num_views, most
    corner = torch.rand(*shape, 2, generator=rng) * 0.5
    side = 0.1 + torch.rand(*shape, 2, generator=rng) * 0.3
    box = (torch.cat([corner, corner + side], -1).double() * REGION_UNIT).int()
    size = (*shape, REGION_TOKENS)
    ids = torch.randint(1, text.vocab_size, size, generator=rng, dtype=torch.int32)
    return torch.cat([box, ids], -1)


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

    def __init__(self, batch: AnyBatch) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[AnyBatch]:
        return self

    def __next__(self) -> AnyBatch:
        return self._batch

    def close(self) -> None:
        """Do nothing: no file is open."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: object) -> None:
        """Do nothing: every batch is the same."""
