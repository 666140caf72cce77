"""How much of a card a run's arithmetic uses, from its config and its speed: MFU and HFU.

Model FLOPs are what the mathematics asks for (`step_flops`: every term, every view, a teacher's
forward pass alone), hardware FLOPs are those and what is computed again. A multiply-accumulate is
two; DCNv3's samples, which run on no tensor core, are in neither.

    MFU = model FLOP/s / peak          HFU = hardware FLOP/s / peak

The peak is the published dense rate of BF16, or in fp32 of FP32 without tensor cores. A run in FP8
has a share f8 of its model FLOPs in FP8, and a second peak that weighs both rates,

    peak_weighted = 1 / (f8 / peak_FP8 + (1 - f8) / peak_BF16)

beside which its MFU of the BF16 peak may exceed 1 and is no figure of how well FP8 is used.
"""

from __future__ import annotations

from dataclasses import dataclass

from m3i_fast.config import TrainConfig
from m3i_fast.config.flops import Flops
from m3i_fast.costs.gpus import Card
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.precision.arithmetic import Arithmetic


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Of one rank and its card."""

    model_flop_s: float
    hardware_flop_s: float
    peak: str | None
    """That mfu and hfu are of: bf16 or fp32; None without a published one."""
    mfu: float | None
    hfu: float | None
    fp8_share: float
    """Of the model FLOPs."""
    mfu_weighted: float | None
    """Of the peak that weighs FP8 and BF16; None without FP8, and on a card without its peak."""


def efficiency(
    cfg: TrainConfig,
    arithmetic: Arithmetic,
    *,
    images_s: float,
    card: Card | None,
    num_ranks: int = 1,
    progress: float = 0.0,
) -> Efficiency:
    """Of a rank that trains so many images a second; `progress` of the run, 0 to 1.

    card: None or the cpu, whose rates are assumed, has no MFU. Raises ValueError as `step_flops`.
    """
    products = without_sampling(step_flops(cfg, num_ranks=num_ranks, progress=progress))
    steps_s = images_s / cfg.data.batch_size
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


def fp8_share(products: Flops, arithmetic: Arithmetic) -> float:
    """Of the model FLOPs, what runs in FP8: all three products of the layers that it runs."""
    in_fp8 = {each for _, layers in arithmetic.products for each in layers}
    return products.of_layers(in_fp8) / products.model


def weighted_peak(card: Card, share: float) -> float | None:
    """FLOP/s of a step with that share in FP8, each part at its peak; None: no FP8 on the card."""
    if card.fp8_flop_s is None:
        return None
    return 1 / (share / card.fp8_flop_s + (1 - share) / card.bf16_flop_s)


def joule_per_image(energy_j: float | None, num_images: float) -> float | None:
    """Of cards that used so much for those images; None where nothing tells."""
    return energy_j / num_images if energy_j is not None and num_images else None
