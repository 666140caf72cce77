"""Model and hardware FLOPs utilisation (MFU, HFU) of a card, from a run's config and speed.

Model FLOPs are those of the mathematics (`step_flops`: every term, every view, a teacher's forward
pass alone); hardware FLOPs also count what is recomputed. A multiply-accumulate counts as two.
DCNv3's sampling, which runs on no tensor core, is in neither.

    MFU = model FLOP/s / peak          HFU = hardware FLOP/s / peak

The peak is the published dense rate of BF16, or for fp32 that of FP32 without tensor cores. A run
in FP8 has a share f8 of its model FLOPs in FP8, and a second peak that weighs both rates,

    peak_weighted = 1 / (f8 / peak_FP8 + (1 - f8) / peak_BF16)

Of such a run the MFU of the BF16 peak may exceed 1, and says nothing about how well FP8 is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.config.objective.flops import Flops
from m3i_fast.costs.gpus import Card
from m3i_fast.costs.packed_pictures import PackedPictures, expected_pictures
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.precision.arithmetic import Arithmetic


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """FLOP rates and utilisation of one rank and its card."""

    model_flop_s: float
    hardware_flop_s: float
    peak: str | None
    """Which peak mfu and hfu are of, bf16 or fp32; None for a card without a published peak."""
    mfu: float | None
    hfu: float | None
    fp8_share: float
    """Share of the model FLOPs that run in FP8."""
    mfu_weighted: float | None
    """MFU of the weighted peak; None without FP8, and for a card without a published FP8 peak."""


def efficiency(
    cfg: TrainConfig,
    arithmetic: Arithmetic,
    *,
    images_s: float,
    card: Card | None,
    num_ranks: int = 1,
    progress: float = 0.0,
    pictures: PackedPictures | None = None,
) -> Efficiency:
    """Return the utilisation of a rank that trains so many images a second.

    progress: of the run, 0 to 1. pictures: the rank's views of any shape, whose own patches are
    counted; None for squares, and for what a budget of tokens is expected to hold. card: None, or
    the CPU, whose rates are assumed, has no MFU.
    Raises ValueError as `step_flops` does.
    """
    products = without_sampling(
        step_flops(cfg, num_ranks=num_ranks, progress=progress, pictures=pictures)
    )
    steps_s = images_s / samples_a_batch(cfg, pictures)
    model_flop_s, hardware_flop_s = products.model * steps_s, products.hardware * steps_s
    share = fp8_share(products, arithmetic)
    rate, label, weighted = None, None, None
    if card is not None and card.is_gpu:
        is_fp32 = arithmetic.recipe == "fp32"
        rate, label = (card.fp32_flop_s, "fp32") if is_fp32 else (card.bf16_flop_s, "bf16")
        weighted = weighted_peak(card, share) if arithmetic.is_fp8 else None
    return Efficiency(
        model_flop_s=model_flop_s,
        hardware_flop_s=hardware_flop_s,
        peak=label,
        mfu=model_flop_s / rate if rate else None,
        hfu=hardware_flop_s / rate if rate else None,
        fp8_share=share,
        mfu_weighted=model_flop_s / weighted if weighted else None,
    )


def samples_a_batch(cfg: TrainConfig, pictures: PackedPictures | None = None) -> float:
    """Return the samples of a rank's batch, of views of any shape on average."""
    if not cfg.data.any_shape:
        return cfg.data.batch_size
    assert isinstance(cfg.vision, ViTConfig)  # any_shape_conflicts
    pictures = pictures or expected_pictures(cfg.data, cfg.vision.patch_size)
    return pictures.samples_a_step


def fp8_share(products: Flops, arithmetic: Arithmetic) -> float:
    """Return the share of the model FLOPs in FP8, counting all three products of a layer."""
    in_fp8 = {each for _, layers in arithmetic.products for each in layers}
    return products.of_layers(in_fp8) / products.model


def weighted_peak(card: Card, share: float) -> float | None:
    """Return the FLOP/s of a step with that FP8 share, each part at its peak; None without FP8."""
    if card.fp8_flop_s is None:
        return None
    return 1 / (share / card.fp8_flop_s + (1 - share) / card.bf16_flop_s)


def joule_per_image(energy_j: float | None, num_images: float) -> float | None:
    """Return the energy an image of cards that used `energy_j`; None where it is not known."""
    return energy_j / num_images if energy_j is not None and num_images else None
