"""What views of any size and aspect, in batches of a budget of tokens, need of the other fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from m3i_fast.config.fields import Conflict
from m3i_fast.config.models.vit import ViTConfig

if TYPE_CHECKING:
    from m3i_fast.config.data import ViewConfig
    from m3i_fast.config.objective.objective import ObjectiveConfig
    from m3i_fast.config.train import TrainConfig


def objective_conflicts(cfg: ObjectiveConfig) -> Iterator[Conflict]:
    """Yield what of an objective needs views of one size, with what to change."""
    for term in cfg.active_terms:
        if term.predictor == "captioner":
            yield (
                "terms",
                f"expected no captioner for views of any size, got {term.name!r}, which reads the "
                "cells of pictures of one shape: give it weight 0",
            )
        if term.kind.of == "cells" and term.predictor == "projector":
            yield (
                "terms",
                f"expected no match of cells for views of any size, got {term.name!r} by the "
                "predictor projector: give it weight 0, or the predictor decoder",
            )
    if cfg.mixing.mode == "blend":
        yield (
            "mixing.mode",
            "expected joint, own_image, masked or none for views of any size, whose pixels cannot "
            "be blended, got blend",
        )


def any_shape_conflicts(cfg: TrainConfig) -> Iterator[Conflict]:
    """Yield what keeps a config from training on views of any size and aspect.

    There are none without `data.max_tokens_per_batch`.
    """
    if not cfg.data.any_shape:
        return
    for name, told in objective_conflicts(cfg.objective):
        yield f"objective.{name}", told
    for name, spec in cfg.objective.teachers.items():
        if spec is not None and spec.startswith("timm:"):
            yield (
                "objective.teacher",
                f"expected a run directory for views of any size, got {spec} for {name}, whose "
                "positions are of one size",
            )
    yield from _unmet(cfg)
    if not isinstance(cfg.vision, ViTConfig):
        return
    yield from _size_conflicts(cfg, cfg.vision.patch_size)


def _unmet(cfg: TrainConfig) -> Iterator[Conflict]:
    """Yield the settings that need batches of one shape."""
    vision, drops = cfg.vision, cfg.vision.drop_path_rate > 0
    attention = vision.attention if isinstance(vision, ViTConfig) else ""
    is_vit = isinstance(vision, ViTConfig)
    in_fp8 = cfg.precision not in ("auto", "fp32", "bf16")
    reads_text = any(term.kind.column == "text" for term in cfg.objective.active_terms)
    backends = ("torchao",) if in_fp8 else ("auto", "torch")
    wanted = {
        "vision": (is_vit, "a ViT, whose tokens know no neighbours,", type(vision).__name__),
        "vision.drop_path_mode": (
            vision.drop_path_mode == "mask" or not drops,
            "mask, since which tokens a subset leaves is not known on the host,",
            vision.drop_path_mode,
        ),
        "vision.attention": (
            attention != "cudnn",
            "auto, flash, fa3, fa4 or math, since cuDNN builds a plan for each new shape,",
            "cudnn",
        ),
        "precision": (
            not in_fp8 or not reads_text,
            "auto, fp32 or bf16, since captions are not of a multiple of 16 tokens,",
            cfg.precision,
        ),
        "backend": (cfg.backend in backends, " or ".join(backends), cfg.backend),
        "objective.teacher_cache": (
            cfg.objective.teacher_cache is None,
            "none, since the cache is of squares,",
            cfg.objective.teacher_cache,
        ),
        "compile": (not cfg.compile, "False, since no two batches have one shape,", cfg.compile),
        "cuda_graphs": (
            cfg.cuda_graphs == "none",
            "none, since a graph holds one shape,",
            cfg.cuda_graphs,
        ),
        "parallel.chunk": (
            not cfg.parallel.chunk,
            "0, and a smaller data.max_tokens_per_batch for less memory,",
            cfg.parallel.chunk,
        ),
    }
    for name, (holds, expected, got) in wanted.items():
        if not holds:
            yield name, f"expected {expected} with data.max_tokens_per_batch, got {got}"


def _size_conflicts(cfg: TrainConfig, patch_size: int) -> Iterator[Conflict]:
    """Yield sizes of views that are not whole patches, and a budget that a sample may not fit."""
    views = {"global_views": cfg.data.global_views, "local_views": cfg.data.local_views}
    wrong = False
    for name, view in views.items():
        if view is not None and any(size % patch_size for size in view.sizes):
            wrong = True
            yield (
                f"data.{name}.size_range",
                f"expected multiples of vision.patch_size = {patch_size}, got {view.sizes}",
            )
    mixing = cfg.objective.mixing
    shared = mixing.images_per_input
    most = sum(_most_tokens(view, patch_size) for view in views.values() if view is not None)
    if not wrong and cfg.data.max_tokens_per_batch < shared * most:
        of = "one sample" if shared == 1 else f"the {shared} samples of an input"
        yield (
            "data.max_tokens_per_batch",
            f"expected at least {shared * most}, the patches that the views of {of} may have, got "
            f"{cfg.data.max_tokens_per_batch}: raise it, or lower data.global_views.size_range",
        )
    if not wrong and mixing.divides_cells and cfg.data.global_views.sizes[0] < 2 * patch_size:
        yield (
            "data.global_views.size_range",
            f"expected at least {2 * patch_size}, two patches of which one is hidden, got "
            f"{cfg.data.global_views.sizes}",
        )


def _most_tokens(view: ViewConfig, patch_size: int) -> int:
    return view.count * (view.sizes[1] // patch_size) ** 2
