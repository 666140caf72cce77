"""Closed-form FLOPs of the encoders against torch's counter and a table of known values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config.models.internimage import (
    InternImageConfig,
    internimage_b,
    internimage_demo,
    internimage_g,
    internimage_h,
    internimage_t,
)
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import (
    ViTConfig,
    dinov2_g,
    dinov3_s_plus,
    vit_b,
    vit_demo,
    vit_h,
    vit_l,
    vit_s,
)
from m3i_fast.costs.encoder_flops import (
    Flops,
    internimage,
    internimage_pool,
    internimage_sampling,
    text,
    vit,
    vit_encode,
    vit_packed,
)
from m3i_fast.models import InternImage, ViT
from m3i_fast.models.transformer.text_encoder import TextEncoder
from tests.shared.flop_formulas import FORMULAS


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        (vit_s(class_token=True), 224),
        (vit_b(num_registers=4), 224),
        (vit_b(), 96),
        (vit_h(), 224),
        (vit_demo(mlp_ratio=2.5), 64),
        (dinov2_g(depth=2), 224),
        (dinov3_s_plus(), 96),
    ],
)
def test_vit_forward(cfg: ViTConfig, size: int) -> None:
    with torch.device("meta"):
        encoder, images = ViT(cfg), torch.empty(3, 3, size, size)
    assert counted(lambda: encoder(images)) == vit(cfg, 3, size).forward


def test_vit_of_some_tokens() -> None:
    cfg = vit_b(class_token=True)
    with torch.device("meta"):
        encoder, tokens = ViT(cfg), torch.empty(5, 98, cfg.dim)
    assert counted(lambda: encoder.encode(tokens)) == vit_encode(cfg, 5, 98).forward


@pytest.mark.parametrize(
    "cfg",
    [
        vit_demo(class_token=True, num_registers=2),
        vit_demo(position="rotary", mlp="swiglu", drop_path_rate=0.3),
        vit_demo(activation_checkpointing="full", layer_scale_init=0.1),
    ],
)
def test_a_step_of_packed_pictures(cfg: ViTConfig) -> None:
    grids = torch.tensor([(3, 4), (4, 3), (8, 8), (1, 5), (2, 6)])
    lengths = grids.prod(1).tolist()
    patches = torch.randn(sum(lengths), 3 * cfg.patch_size**2)
    encoder = ViT(cfg).train()
    flops = vit_packed(cfg, lengths)
    with torch.no_grad():
        assert counted(lambda: encoder.encode_pictures(patches, grids)) == flops.forward
    whole = counted(lambda: encoder.encode_pictures(patches, grids).cells.sum().backward())
    assert whole == flops.hardware


def _sample_nothing(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(x)  # the op itself knows no autocast of the meta device


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        (internimage_t(), 224),
        (internimage_b(), 224),
        (internimage_t(num_classes=0), 200),  # sides that no stride divides
        (internimage_h(), 224),
        (internimage_g(image_size=256), 256),
        (internimage_demo(), 128),
    ],
)
def test_internimage_forward(cfg: InternImageConfig, size: int) -> None:
    with torch.device("meta"):
        encoder, images = InternImage(cfg, core=_sample_nothing), torch.empty(2, 3, size, size)
    run = encoder.encode_cells if cfg.use_clip_projector else encoder
    assert counted(lambda: run(images)) == internimage(cfg, 2, size).forward


def test_internimage_pool() -> None:
    cfg = internimage_h()
    with torch.device("meta"):
        encoder, tokens = InternImage(cfg), torch.empty(3, 49, cfg.token_dim)
    assert counted(lambda: encoder.pool(tokens)) == internimage_pool(cfg, 3, 49).forward


def test_internimage_sampling_is_five_for_each_point_and_channel() -> None:
    cfg = internimage_t()  # 4, 4, 18, 4 layers of 64 to 512 channels at 56 to 7 cells a side
    stages = [(4, 56, 64), (4, 28, 128), (18, 14, 256), (4, 7, 512)]
    expected = sum(5 * depth * side**2 * 9 * width for depth, side, width in stages)
    assert internimage_sampling(cfg).forward == expected


def test_the_official_internimage_t_has_five_gflop() -> None:
    # arXiv 2211.05778, table 2: 5 G, in multiply-accumulates; the sampling is part of it
    of_layers = internimage(internimage_t()).forward / 2
    assert (of_layers + internimage_sampling(internimage_t()).forward) / 1e9 == pytest.approx(
        5.0, rel=0.05
    )


@pytest.mark.parametrize("length", [24, 77])
def test_text_forward(length: int) -> None:
    cfg = TextConfig(context_length=length)
    with torch.device("meta"):
        encoder, ids = TextEncoder(cfg), torch.empty(3, length, dtype=torch.int64)
        num_tokens = torch.empty(3, dtype=torch.int64)
    assert counted(lambda: encoder(ids, num_tokens)) == text(cfg, 3).forward


VIT_G = ViTConfig(patch_size=14, dim=1408, depth=40, num_heads=16)


@pytest.mark.parametrize(
    ("cfg", "forward_gmac", "train_gflop"),
    [
        (vit_s(), 4.60, 27.6),
        (vit_b(), 17.56, 105.4),
        (vit_l(), 61.55, 369.3),
        (vit_h(), 167.3, 1003.8),
        (VIT_G, 252.2, 1513),
    ],
)
def test_vits_have_the_known_flops(cfg: ViTConfig, forward_gmac: float, train_gflop: float) -> None:
    """At 224 pixels with a class token; the table's training is three times the forward pass."""
    one = vit(replace(cfg, class_token=True))
    assert one.forward / 2e9 == pytest.approx(forward_gmac, rel=0.002)
    assert one.model / 1e9 == pytest.approx(train_gflop, rel=0.01)


def test_training_is_three_forward_passes_but_for_the_gradient_of_pixels() -> None:
    cfg = vit_b()
    patches = 2 * cfg.num_patches * 3 * 16**2 * cfg.dim
    assert vit(cfg).model == 3 * vit(cfg).forward - patches


def test_recomputation_is_hardware_flops_alone() -> None:
    """A third of a block is its last product, which is left out where nothing reads it."""
    plain = vit(vit_b())
    for rate, share in ((0.0, 0.67), (0.1, 0.97)):
        again = vit(vit_b(activation_checkpointing="full", drop_path_rate=rate))
        assert again.model == plain.model
        more = again.hardware - plain.hardware
        assert more / plain.forward == pytest.approx(share, abs=0.02)
    assert vit(vit_b(activation_checkpointing="selective")) == plain


def test_sums_and_multiples() -> None:
    assert Flops(1, 2, 3) + Flops(10, 20, 30) == Flops(11, 22, 33)
    assert Flops(1, 2, 3) * 4 == Flops(4, 8, 12)
    assert Flops(1, 2, 3).hardware == 6
