"""Opens the loader of a run: of squares in batches of one size, or of views of any shape."""

from __future__ import annotations

from pathlib import Path

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.loader import Loader


def open_loader(
    cfg: TrainConfig,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    device_id: int | None = None,
    skipped_file: Path | None = None,
) -> Loader | PackedLoader:
    """Open the training data of a run for one of its ranks.

    device_id: the GPU that decodes, cuts and holds the views; None for the CPU. Raises as `Loader`
    and `PackedLoader`.
    """
    accumulate = cfg.parallel.accumulate
    if not cfg.data.any_shape:
        return Loader(
            cfg.data,
            rank=rank,
            num_ranks=num_ranks,
            accumulate=accumulate,
            images_per_input=cfg.objective.mixing.images_per_input,
            device_id=device_id,
            skipped_file=skipped_file,
        )
    assert isinstance(cfg.vision, ViTConfig)  # any_shape_conflicts
    patch_size = cfg.vision.patch_size
    global_sides, local_sides = cfg.data.patch_sides(patch_size)
    return PackedLoader(
        cfg.data,
        token_budget=cfg.data.max_tokens_per_batch,
        patch_size=patch_size,
        global_sides=global_sides,
        local_sides=local_sides,
        rank=rank,
        num_ranks=num_ranks,
        accumulate=accumulate,
        images_per_input=cfg.objective.mixing.images_per_input,
        device_id=device_id,
        skipped_file=skipped_file,
    )
