"""Floating-point operations of a training step of a run, in closed form from its config."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs import objective_flops
from m3i_fast.costs.packed_pictures import PackedPictures, expected_pictures
from m3i_fast.costs.step_sizes import StepCounts
from m3i_fast.costs.teacher_config import teacher_vision


def counts_of(
    cfg: TrainConfig,
    *,
    num_ranks: int = 1,
    progress: float = 0.0,
    teachers: Mapping[str, VisionConfig] = MappingProxyType({}),
    pictures: PackedPictures | None = None,
) -> StepCounts:
    """Return the counts of a step of one of `num_ranks` ranks.

    progress: of the run, 0 to 1. teachers: configs of the frozen encoders by `Term.target_encoder`.
    pictures: views of any shape, of a config with a budget of tokens; None: those expected.
    """
    local, batch_size = cfg.data.local_views, cfg.data.batch_size
    if cfg.data.any_shape:
        assert isinstance(cfg.vision, ViTConfig)  # any_shape_conflicts
        pictures = pictures or expected_pictures(cfg.data, cfg.vision.patch_size)
        images = cfg.objective.mixing.images_per_input
        batch_size = max(round(pictures.samples_a_step) // images, 1) * images
    return StepCounts(
        vision=cfg.vision,
        text=cfg.text,
        objective=cfg.objective,
        num_classes=cfg.num_classes,
        columns=cfg.columns,
        batch_size=batch_size,
        num_ranks=num_ranks,
        num_local=local.count if local is not None else 0,
        local_size=local.size if local is not None else 0,
        num_regions=cfg.data.max_regions,
        encoder_grad=not cfg.optim.freeze_encoder,
        chunk=cfg.parallel.chunk,
        teachers=teachers,
        progress=progress,
        collects=progress * cfg.num_steps < cfg.objective.phi_s_steps,
        pictures=pictures,
    )


def step_flops(
    cfg: TrainConfig,
    *,
    num_ranks: int = 1,
    progress: float = 0.0,
    pictures: PackedPictures | None = None,
) -> dict[str, Flops]:
    """Count a step of one rank by part of the model, without optimiser, average and monitors.

    pictures: as of `counts_of`.

    Raises ValueError for a frozen teacher that is no run of ours, whose size is unknown, and
    FileNotFoundError for a run that is not there.
    """
    size, specs = cfg.vision.image_size, cfg.objective.teachers
    teachers = {name: _teacher(spec, size) for name, spec in specs.items()}
    counts = counts_of(
        cfg, num_ranks=num_ranks, progress=progress, teachers=teachers, pictures=pictures
    )
    return objective_flops.step(counts)


def _teacher(spec: str | None, image_size: int) -> VisionConfig:
    vision = teacher_vision(spec, image_size) if spec is not None else None
    if vision is None:
        raise ValueError(
            "objective.terms: expected no term with a frozen encoder, or one of our runs as "
            f"objective.teacher, whose size is known, got teacher {spec}"
        )
    return vision


def without_sampling(parts: Mapping[str, Flops]) -> Flops:
    """Return the sum of all parts but the sampling: what MFU divides by a peak rate."""
    return sum((v for k, v in parts.items() if k != objective_flops.SAMPLING), start=Flops())
