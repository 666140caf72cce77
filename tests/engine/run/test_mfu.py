"""MFU and HFU against arithmetic by hand, and the share of FP8 against a real step's products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8.float8_training_tensor import Float8TrainingTensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.costs.gemm_shapes import gemm_shapes
from m3i_fast.costs.gpus import CARDS, Card, card_of
from m3i_fast.costs.step_flops import step_flops, without_sampling
from m3i_fast.engine.precision.arithmetic import Arithmetic, Capabilities, resolve_precision
from m3i_fast.engine.run.mfu import efficiency, fp8_share, joule_per_image, weighted_peak
from m3i_fast.recipes import recipes, shrink
from tests.shared.engine.real_step import stepper

TEXT = TextConfig(vocab_size=90, context_length=24, dim=32, depth=2, num_heads=2, embed_dim=32)
CPU = Capabilities(device="cpu", torchao=True)
H100 = Capabilities(device="cuda", capability=(9, 0), cuda=(13, 0), te=True, torchao=True)
BF16 = Arithmetic(recipe="bf16", backend="torch", compute_dtype=torch.bfloat16)
FP32 = replace(BF16, recipe="fp32", compute_dtype=torch.float32)


def fp8_on_hopper(cfg: TrainConfig) -> Arithmetic:
    return resolve_precision(H100, gemm_shapes(cfg), "fp8_current", "te")


def test_vit_b_by_hand() -> None:
    """The published 17.56 GMAC of ViT-B/16 with a class token, three times over."""
    cfg = recipes()["m3i_vit_b"]()
    images_s, found = 3000.0, efficiency
    products = without_sampling(step_flops(cfg))
    got = found(cfg, BF16, images_s=images_s, card=CARDS["h100"])
    assert got.model_flop_s == pytest.approx(products.model / 512 * 3000)
    assert got.peak == "bf16" and got.mfu == pytest.approx(got.model_flop_s / 989e12)
    assert got.hfu == pytest.approx(products.hardware / 512 * 3000 / 989e12) and got.hfu > got.mfu
    assert got.fp8_share == 0 and got.mfu_weighted is None
    # An input of two half images, and two targets of whole ones forward: 0.5 x 3 + 2 / 2 passes.
    assert got.model_flop_s / images_s > 2.4 * 2 * 17.4e9


def test_what_is_computed_again_is_in_hfu_alone() -> None:
    plain = recipes()["m3i_vit_l"]()
    assert isinstance(plain.vision, ViTConfig)
    again = replace(plain, vision=replace(plain.vision, activation_checkpointing="full"))
    a, b = (efficiency(c, BF16, images_s=500, card=CARDS["h100"]) for c in (plain, again))
    assert a.mfu == b.mfu and a.hfu is not None and b.hfu is not None and b.hfu > 1.1 * a.hfu


def test_fp32_is_of_the_rate_without_tensor_cores() -> None:
    cfg = recipes()["m3i_vit_b"]()
    found = efficiency(cfg, FP32, images_s=100, card=CARDS["h100"])
    assert found.peak == "fp32" and found.mfu == pytest.approx(found.model_flop_s / 67e12)


@pytest.mark.parametrize("card", [None, CARDS["cpu"]])
def test_no_published_peak_has_no_mfu(card: Card | None) -> None:
    found = efficiency(recipes()["demo"](), FP32, images_s=100, card=card)
    assert found.model_flop_s > 0
    assert found.mfu is found.hfu is found.mfu_weighted is found.peak is None


def test_a_run_in_fp8_has_two_peaks() -> None:
    cfg = recipes()["m3i_vit_h"]()
    found = efficiency(cfg, fp8_on_hopper(cfg), images_s=900, card=CARDS["h100"])
    plain = efficiency(cfg, BF16, images_s=900, card=CARDS["h100"])
    assert found.peak == "bf16" and found.mfu == plain.mfu
    assert 0.8 < found.fp8_share < 0.99 and found.mfu_weighted is not None
    seconds = found.fp8_share / 1978e12 + (1 - found.fp8_share) / 989e12  # of one FLOP
    assert found.mfu_weighted == pytest.approx(found.model_flop_s * seconds)
    without = efficiency(cfg, fp8_on_hopper(cfg), images_s=900, card=CARDS["a100"])
    assert without.mfu is not None and without.mfu_weighted is None


def test_weighted_peaks() -> None:
    assert weighted_peak(CARDS["h100"], 0.0) == pytest.approx(989e12)
    assert weighted_peak(CARDS["h100"], 1.0) == pytest.approx(1978e12)
    assert weighted_peak(CARDS["b200"], 0.5) == pytest.approx(3000e12)
    assert weighted_peak(CARDS["a100"], 0.5) is None


def test_more_ranks_and_a_later_step_change_the_work() -> None:
    cfg = recipes()["m3i_vit_b"]()
    one, many = (
        efficiency(cfg, BF16, images_s=100, card=None, num_ranks=ranks) for ranks in (1, 64)
    )
    assert many.model_flop_s > one.model_flop_s
    masked = recipes()["demo_mae"]()
    mixing = replace(masked.objective.mixing, mask_ratio=0.25, final_mask_ratio=0.75)
    masked = replace(masked, objective=replace(masked.objective, mixing=mixing))
    early, late = (
        efficiency(masked, FP32, images_s=100, card=None, progress=at) for at in (0.0, 1.0)
    )
    assert early.model_flop_s > late.model_flop_s


class Float8Products(TorchDispatchMode):
    """FLOPs of the products of torchao's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(each, Float8TrainingTensor) for each in args):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                a, b = args[-2:]
                self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["m3i_vit_b", "m3i_internimage_t", "demo_dino", "demo_mae"])
def test_the_share_of_fp8_is_what_a_real_step_multiplies_in_it(name: str) -> None:
    cfg = shrink(recipes()[name](), path=Path("nowhere"), num_classes=9, text=TEXT)
    cfg = replace(
        cfg,
        data=replace(cfg.data, batch_size=16),
        optim=replace(cfg.optim, matrices="adamw"),
        fp8_min_dim=32,
    )
    arithmetic = resolve_precision(CPU, gemm_shapes(cfg), "fp8_current", "auto")
    step = stepper(cfg, arithmetic=arithmetic)
    with Float8Products() as seen:
        step()
    products = without_sampling(step_flops(cfg))
    assert fp8_share(products, arithmetic) == pytest.approx(seen.flops / products.model, rel=0.001)
    assert seen.flops > 0.2 * products.model


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H100 NVL", "h100_nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200_nvl"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_cards_by_the_name_that_torch_has_for_them(name: str, card: str) -> None:
    assert card_of(name) == CARDS[card]


@pytest.mark.parametrize(
    "name", ["NVIDIA H100", "NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA GB200", "Tesla V100-SXM2"]
)
def test_a_card_that_is_not_known(name: str) -> None:
    reason = card_of(name)
    assert isinstance(reason, str) and name in reason and "h100_nvl" in reason


def test_a_part_of_a_card_has_no_peak() -> None:
    assert "a part of a card" in str(card_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb"))


def test_joule_per_image() -> None:
    assert joule_per_image(1200.0, 400) == 3.0
    assert joule_per_image(None, 400) is None and joule_per_image(5.0, 0) is None
