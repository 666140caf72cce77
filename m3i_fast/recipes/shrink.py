"""A recipe at a size that trains in a second, to try it on other data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from m3i_fast.config.data import LoaderConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.train import TrainConfig


def shrink(cfg: TrainConfig, *, path: Path, num_classes: int, text: TextConfig) -> TrainConfig:
    """Make the same recipe at a size that trains in a second, to try it on other data."""
    vision = _shrink_vision(cfg.vision)
    views = replace(cfg.data.global_views, size=vision.image_size)
    data = replace(cfg.data, path=path, batch_size=4, global_views=views, num_threads=1)
    if isinstance(vision, ViTConfig) and data.any_shape:
        data = _shrink_any_shape(data, vision.patch_size)
    return replace(
        cfg,
        num_steps=2,
        num_classes=num_classes,
        vision=vision,
        text=text,
        data=data,
        objective=replace(
            cfg.objective,
            decoder=replace(cfg.objective.decoder, dim=32, depth=1, num_heads=2),
            captioner=replace(cfg.objective.captioner, dim=32, depth=1, num_heads=2),
            projector=replace(
                cfg.objective.projector, hidden_dim=32, output_dim=16, predictor_hidden_dim=16
            ),
            head_hidden_dim=32,
            num_prototypes=16,
            queue_length=16,
        ),
        compile=False,
        log_every=1,
        checkpoint_every=2,
    )


def _shrink_any_shape(data: LoaderConfig, patch_size: int) -> LoaderConfig:
    """Take views of 2 to 6 patches a side, local ones of 1 to 3, and a budget of some samples."""
    shown = replace(data.global_views, size_range=(2 * patch_size, 6 * patch_size))
    local = data.local_views
    if local is not None:
        local = replace(local, size_range=(patch_size, 3 * patch_size))
    most = 36 * shown.count + (0 if local is None else 9 * local.count)
    return replace(data, global_views=shown, local_views=local, max_tokens_per_batch=4 * most)


def _shrink_vision(cfg: VisionConfig) -> VisionConfig:
    """Take a grid of 4 x 4 tokens, two layers or a layer a stage; the options stay."""
    if isinstance(cfg, ViTConfig):
        return replace(cfg, image_size=4 * cfg.patch_size, dim=32, depth=2, num_heads=2)
    return replace(
        cfg,
        image_size=64,
        channels=16,
        depths=(1, 1, 1, 1),
        groups=(1, 2, 4, 8),
        level2_post_norm_block_ids=(0,) if cfg.level2_post_norm else None,
        token_dim=32,
        pool_heads=2,
        pooled_dim=32,
    )
