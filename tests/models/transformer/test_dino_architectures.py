"""DINOv2's and DINOv3's Vision Transformers against timm's, on random weights and odd sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from m3i_fast.config.models import vit as sizes
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.timm import load_timm, to_timm
from m3i_fast.export.vit_weights import vit_weights
from m3i_fast.models.transformer.blocks import TORCH_LAYERS
from m3i_fast.models.transformer.float8 import FLOAT8_LAYERS
from m3i_fast.models.transformer.layers import Residual
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.models.transformer.wide_layers import wide_only

SMALL = {"dim": 64, "depth": 2, "num_heads": 2}
# timm's name of the architecture, our config of it
CASES: dict[str, ViTConfig] = {
    "vit_small_patch14_dinov2": sizes.dinov2_s(num_registers=0, image_size=70, **SMALL),
    "vit_small_patch14_reg4_dinov2": sizes.dinov2_s(image_size=70, **SMALL),
    "vit_giant_patch14_reg4_dinov2": sizes.dinov2_g(image_size=70, **SMALL | {"dim": 96}),
    "vit_small_patch16_dinov3": sizes.dinov3_s(image_size=80, **SMALL),
    "vit_small_patch16_dinov3_qkvb": sizes.dinov3_s(image_size=80, **SMALL),
    "vit_huge_plus_patch16_dinov3_qkvb": sizes.dinov3_h_plus(image_size=80, **SMALL),
    "vit_7b_patch16_dinov3": sizes.dinov3_7b(image_size=80, **SMALL),
}
DINOV3 = [name for name in CASES if "dinov3" in name]


def spread(model: nn.Module) -> None:
    """Move every parameter off its initial value, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def make_timm(name: str, cfg: ViTConfig) -> Any:
    model = timm.create_model(
        name,
        img_size=cfg.image_size,
        embed_dim=cfg.dim,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        dynamic_img_size=True,
        num_classes=0,
    )
    spread(model)
    return model.eval()


def twins(name: str) -> tuple[ViT, Any]:
    cfg = CASES[name]
    theirs, ours = make_timm(name, cfg), ViT(cfg)
    weights = vit_weights(theirs.state_dict(), "timm", cfg)
    assert not weights.new and not weights.left_out
    ours.load_state_dict(weights.tensors)
    return ours.eval(), theirs


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 4)])
def test_features_are_timms(name: str, grid: tuple[int, int]) -> None:
    ours, theirs = twins(name)
    images = torch.randn(2, 3, *(side * ours.cfg.patch_size for side in grid))
    assert_equal(ours(images), theirs.forward_features(images))


@pytest.mark.parametrize("name", CASES)
def test_features_of_a_part_of_the_patches_are_timms(name: str) -> None:
    """Of an image whose other patches are masked, each at the place that it had."""
    ours, theirs = twins(name)
    images = torch.randn(2, 3, ours.cfg.image_size, ours.cfg.image_size)
    index = torch.stack([torch.randperm(25)[:9] for _ in range(2)])
    x, rope = theirs.patch_embed(images), None
    if name in DINOV3:
        x, rope = theirs._pos_embed(x)
    else:
        x = theirs._pos_embed(x)
    for image, cells in enumerate(index):
        prefix = torch.arange(ours.num_prefix)
        own = x[image : image + 1, torch.cat([prefix, ours.num_prefix + cells])]
        for block in theirs.blocks:
            own = block(own) if rope is None else block(own, rope=rope[cells])
        expected = theirs.norm(own)[:, ours.num_prefix :]
        assert_equal(ours.encode_alone(images, index)[image : image + 1], expected)


@pytest.mark.parametrize("name", ["vit_giant_patch14_reg4_dinov2", DINOV3[2]])
def test_gradients_are_timms(name: str) -> None:
    ours, theirs = twins(name)
    images = torch.randn(2, 3, ours.cfg.image_size, ours.cfg.image_size)
    scale = torch.randn(2, ours.num_prefix + 25, ours.dim)
    gradients = []
    for function in (ours, theirs.forward_features):
        pixels = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad((function(pixels) * scale).sum(), pixels)[0])
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (sizes.dinov2_s(), "vit_small_patch14_reg4_dinov2"),
        (sizes.dinov2_b(), "vit_base_patch14_reg4_dinov2"),
        (sizes.dinov2_l(), "vit_large_patch14_reg4_dinov2"),
        (sizes.dinov2_g(), "vit_giant_patch14_reg4_dinov2"),
        (sizes.dinov3_s(), "vit_small_patch16_dinov3_qkvb"),
        (sizes.dinov3_s_plus(), "vit_small_plus_patch16_dinov3_qkvb"),
        (sizes.dinov3_b(), "vit_base_patch16_dinov3_qkvb"),
        (sizes.dinov3_l(), "vit_large_patch16_dinov3_qkvb"),
        (sizes.dinov3_h_plus(), "vit_huge_plus_patch16_dinov3_qkvb"),
        (sizes.dinov3_7b(), "vit_7b_patch16_dinov3"),
    ],
)
def test_published_sizes_are_timms(ours: ViTConfig, name: str) -> None:
    with torch.device("meta"):
        vit = ViT(ours)
        reference = timm.create_model(
            name, num_classes=0, img_size=ours.image_size, dynamic_img_size=True
        )
    counts = [sum(p.numel() for p in m.parameters()) for m in (vit, reference)]
    assert counts[0] == counts[1]
    assert ours.num_heads == reference.blocks[0].attn.num_heads


def test_swiglu_goes_to_timm_and_back() -> None:
    cfg = CASES["vit_giant_patch14_reg4_dinov2"]
    vit = ViT(replace(cfg, norm_eps=1e-5)).eval()
    spread(vit)
    model = to_timm(vit)
    images = torch.randn(2, 3, 42, 70)
    assert_equal(vit(images), model.forward_features(images))
    back = load_timm(model, vit.cfg).state_dict()
    assert all(torch.equal(back[name], value) for name, value in vit.state_dict().items())
    with pytest.raises(ValueError, match=r"norm1\.eps: expected 1e-06, got 1e-05"):
        load_timm(model, cfg)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp: expected gelu, got GluMlp"):
        load_timm(model, replace(vit.cfg, mlp="gelu"))
    with pytest.raises(ValueError, match="key_bias: expected True"):
        to_timm(ViT(replace(cfg, key_bias=False)))


@pytest.mark.parametrize("name", ["vit_giant_patch14_reg4_dinov2", DINOV3[2]])
def test_blocks_compile_and_run_in_fp8(name: str) -> None:
    """All new parts in one graph, and FP8 in the products: near to fp32, and not equal to it."""
    cfg = CASES[name]
    ours, _ = twins(name)
    images = torch.randn(2, 3, cfg.image_size, cfg.image_size)
    expected = ours(images)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=1e-5)
    rounded = ViT(cfg, layers=wide_only(FLOAT8_LAYERS, 16)).eval()
    rounded.load_state_dict(ours.state_dict())
    error = rounded(images[:, :, : cfg.patch_size * 4]) - ours(images[:, :, : cfg.patch_size * 4])
    scale = expected.abs().mean()
    assert 1e-3 < error.abs().mean() / scale < 0.1
    narrow = ViT(cfg, layers=wide_only(FLOAT8_LAYERS, 10_000, narrow=TORCH_LAYERS)).eval()
    narrow.load_state_dict(ours.state_dict())
    assert torch.equal(narrow(images), expected)


def test_a_bias_without_keys_has_no_part_for_them() -> None:
    vit = ViT(CASES[DINOV3[0]])
    state = vit.state_dict()
    assert state["blocks.0.query_value_bias"].shape == (128,)
    assert "blocks.0.layernorm_qkv.bias" not in state
    assert not state["blocks.0.query_value_bias"].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert vit.blocks[0]._qkv(Residual(torch.randn(1, 2, 64)))[1].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="norm_eps: expected 0 < eps < 1, got 0"):
        sizes.vit_s(norm_eps=0.0)
