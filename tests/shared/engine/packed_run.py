"""A run on views of any shape that is small enough for a test, and parts of its batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.data import LoaderConfig
from m3i_fast.models.transformer.ragged import mapped
from m3i_fast.objectives import packed_views
from m3i_fast.objectives.heads import PackedQuestion
from m3i_fast.objectives.terms import dense
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.recipes import demo_method, shrink
from tests.shared.engine.parts_of_batches import in_double_precision
from tests.shared.engine.small_run import TEXT

PATCH = 8


def packed_run(dataset: Path, method: str, **overrides: Any) -> TrainConfig:
    """Views of 2 to 6 patches a side and aspects of 1:2 to 2:1, some ten pictures a batch."""
    cfg = shrink(demo_method(method), path=dataset, num_classes=9, text=TEXT)
    view = replace(cfg.data.global_views, size_range=(2 * PATCH, 6 * PATCH), ratio=(0.5, 2.0))
    data = replace(cfg.data, global_views=view, max_tokens_per_batch=320 * view.count)
    local = cfg.data.local_views
    if local is not None:
        local = replace(local, size_range=(PATCH, 3 * PATCH), ratio=(0.5, 2.0))
        data = replace(data, local_views=local)
    mixing = replace(cfg.objective.mixing, token_dropout=0.0)
    cfg = replace(
        cfg,
        data=data,
        objective=replace(cfg.objective, mixing=mixing),
        # An epsilon far above rounding: else AdamW makes whole steps of gradients that are 0.
        optim=replace(cfg.optim, matrices="adamw", eps=1e-3, clip_grad_norm=0.1),
        num_steps=6,
        num_threads=1,
        log_every=3,
        checkpoint_every=6,
    )
    return replace(cfg, **overrides)


def of_squares(cfg: TrainConfig, pictures: int) -> tuple[TrainConfig, TrainConfig]:
    """The run on squares of one size, and the same pictures and views as a budget of tokens."""
    size = cfg.vision.image_size
    shown = replace(cfg.data.global_views, size=size, size_range=None, ratio=(1.0, 1.0))
    data: LoaderConfig = replace(
        cfg.data, global_views=shown, local_views=None, max_tokens_per_batch=0, batch_size=pictures
    )
    if cfg.data.local_views is not None:
        local = replace(cfg.data.local_views, size=size // 2, size_range=None, ratio=(1.0, 1.0))
        data = replace(data, local_views=local)
    tokens = shown.count * (size // PATCH) ** 2
    if data.local_views is not None:
        tokens += data.local_views.count * (data.local_views.size // PATCH) ** 2
    packed = replace(data, max_tokens_per_batch=pictures * tokens)
    return replace(cfg, data=data), replace(cfg, data=packed)


@contextmanager
def packed_in_double_precision() -> Iterator[None]:
    """Weights in fp64, and patches, pixels, positions and what modules are given."""
    normalised, pixels = packed_views._normalised, dense.target_pixels
    questions = dense.packed_questions

    def widened(*given: Any) -> list[PackedQuestion]:
        asked = questions(*given)
        return [q._replace(position=mapped(torch.Tensor.double, q.position)) for q in asked]

    packed_views._normalised = lambda patches: normalised(patches).double()
    dense.target_pixels = lambda *given: mapped(torch.Tensor.double, pixels(*given))
    dense.packed_questions = widened
    try:
        with in_double_precision():
            yield
    finally:
        packed_views._normalised, dense.target_pixels = normalised, pixels
        dense.packed_questions = questions


def in_double(batch: PackedBatch) -> PackedBatch:
    return replace(batch, boxes=batch.boxes.double())


def split(batch: PackedBatch, counts: Sequence[int]) -> list[PackedBatch]:
    """Parts of so many pictures, which are the batches of one step."""
    assert sum(counts) == batch.batch_size
    parts = []
    for first, end in pairwise([0, *accumulate(counts)]):
        changed: dict[str, Any] = {"step_counts": tuple(counts)}
        for field in fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = value[first:end]
        changed["patches"] = tuple(
            torch.cat(patches.split(batch.lengths(view))[first:end])
            for view, patches in enumerate(batch.patches)
        )
        changed["columns"] = {name: rows[first:end] for name, rows in batch.columns.items()}
        parts.append(replace(batch, **changed))
    return parts
