"""timm models in and out: features, gradients, round trips and refusals."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from m3i_fast.config.models.vit import ViTConfig, vit_demo, vit_s
from m3i_fast.export.timm import load_timm, to_timm
from m3i_fast.models.transformer.vit import ViT

TINY = ViTConfig(
    image_size=32,
    patch_size=8,
    dim=32,
    depth=2,
    num_heads=2,
    class_token=True,
    num_registers=4,
    layer_scale_init=0.1,
)

# name, timm's arguments, the config that describes it
CASES: dict[str, tuple[str, dict[str, Any], ViTConfig]] = {
    "class token": ("vit_small_patch16_224", {}, vit_s(depth=2, class_token=True)),
    "registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 112},
        vit_s(
            image_size=112,
            patch_size=14,
            depth=2,
            class_token=True,
            num_registers=4,
            layer_scale_init=1e-5,
        ),
    ),
    "registers with a position": (
        "vit_small_patch16_224",
        {"reg_tokens": 3},
        vit_s(depth=2, class_token=True, num_registers=3),
    ),
    "layer scale": (
        "vit_small_patch14_dinov2",
        {"img_size": 112},
        vit_s(image_size=112, patch_size=14, depth=2, class_token=True, layer_scale_init=1e-5),
    ),
    "no class token": (
        "vit_small_patch16_224",
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        vit_s(depth=2),
    ),
    "norm after pooling": (
        "vit_small_patch16_224",
        {"class_token": False, "global_pool": "avg"},
        vit_s(depth=2, final_norm=False),
    ),
    "clip": (
        "vit_xsmall_patch16_clip_224",
        {"act_layer": "quick_gelu"},
        ViTConfig(
            **{"dim": 256, "depth": 2, "num_heads": 4, "class_token": True, "pre_norm": True},
            norm_eps=1e-5,
            mlp="quick_gelu",
        ),
    ),
    "tanh": (
        "vit_small_patch16_224",
        {"act_layer": "gelu_tanh"},
        vit_s(depth=2, class_token=True, mlp="gelu_tanh"),
    ),
    "no qkv bias": (
        "vit_small_patch16_224",
        {"qkv_bias": False},
        vit_s(depth=2, class_token=True, qkv_bias=False),
    ),
}


def perturb(model: nn.Module) -> None:
    """Move every parameter off its initial value, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def make_timm(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{"depth": 2} | options)
    perturb(model)
    return model.eval()


def make_tiny() -> ViT:
    torch.manual_seed(0)
    vit = ViT(TINY)
    perturb(vit)
    return vit.eval()


def features_and_image_gradient(function: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.requires_grad_()
    features = function(images)
    torch.manual_seed(1)
    noise = torch.randn(features.shape)  # randn_like would draw in the order of memory
    (gradient,) = torch.autograd.grad((features * noise).sum(), images)
    return features, gradient


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bare", [False, True])
def test_features_equal_timm(case: str, bare: bool) -> None:
    name, options, cfg = CASES[case]
    model = make_timm(name, **options)
    vit = load_timm(model.state_dict() if bare else model, cfg).eval()
    images = torch.randn(2, 3, cfg.image_size, cfg.image_size)
    got, got_gradient = features_and_image_gradient(vit, images)
    expected, expected_gradient = features_and_image_gradient(model.forward_features, images)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_gradient, expected_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [96, 256])
def test_another_image_size_interpolates_as_timm(size: int) -> None:
    model = make_timm("vit_small_patch16_224", dynamic_img_size=True)
    cfg = vit_s(depth=2, class_token=True)
    images = torch.randn(1, 3, size, size)
    expected = model.forward_features(images)
    at_run_time = load_timm(model, cfg)
    when_loaded = load_timm(model, replace(cfg, image_size=size))
    assert when_loaded.pos_embed.shape[1] == (size // 16) ** 2
    torch.testing.assert_close(at_run_time(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(when_loaded(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_registers": 0},
        {"class_token": False},
        {"class_token": False, "num_registers": 0, "final_norm": False},
        {"layer_scale_init": None},
        {"layer_scale_init": 0.0, "qkv_bias": False},
    ],
)
def test_a_model_sent_to_timm_and_back_is_the_same(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    vit = ViT(replace(TINY, **options))
    perturb(vit)
    vit.eval()
    model = to_timm(vit)
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    torch.testing.assert_close(features, vit(images), atol=1e-5, rtol=1e-5)
    larger = torch.randn(2, 3, 48, 24)
    expected = model.forward_features(larger)
    torch.testing.assert_close(vit(larger), expected, atol=1e-5, rtol=1e-5)
    back = load_timm(model, vit.cfg).state_dict()
    for name, value in vit.state_dict().items():
        assert torch.equal(back[name], value), name


def test_exported_weights_fit_timms_own_models_and_are_copies() -> None:
    torch.manual_seed(0)
    vit = ViT(vit_s(depth=2, class_token=True)).bfloat16()
    exported = to_timm(vit)
    assert exported.training and not to_timm(make_tiny()).training
    assert exported.pos_embed.dtype == torch.bfloat16
    plain = timm.create_model("vit_small_patch16_224", depth=2, num_classes=0)
    plain.load_state_dict(exported.state_dict())
    before = exported.cls_token.clone()
    perturb(vit)
    assert torch.equal(exported.cls_token, before)


def test_missing_and_unexpected_weights_are_named() -> None:
    state = to_timm(make_tiny()).state_dict()
    state["blocks.1.attn.q_norm.weight"] = torch.ones(16)
    del state["blocks.0.ls1.gamma"], state["cls_token"]
    with pytest.raises(ValueError) as error:
        load_timm(state, TINY)
    assert "missing: blocks.0.ls1.gamma, cls_token" in str(error.value)
    assert "unexpected: blocks.1.attn.q_norm.weight" in str(error.value)


def test_weights_of_another_shape_are_named_with_both_shapes() -> None:
    state = to_timm(make_tiny()).state_dict()
    with pytest.raises(ValueError, match=r"fc1_weight: expected \[64, 32\], got \[128, 32\]"):
        load_timm(state, replace(TINY, mlp_ratio=2.0))
    with pytest.raises(ValueError, match=r"register_tokens: expected \[1, 2, 32\], got \[1, 4"):
        load_timm(state, replace(TINY, num_registers=2))


def test_a_position_table_that_fits_no_grid_is_refused() -> None:
    state = to_timm(make_tiny()).state_dict()
    state["pos_embed"] = torch.zeros(1, 18, 32)
    with pytest.raises(ValueError, match="pos_embed: expected .* none or 5 before them, got 18"):
        load_timm(state, TINY)


def test_an_ambiguous_position_table_is_read_by_the_config() -> None:
    """Nine positions with five prefix tokens: a 3 x 3 grid, or 2 x 2 and the prefix."""
    state = to_timm(make_tiny()).state_dict()
    state["pos_embed"] = torch.randn(1, 9, 32)
    three = load_timm(state, replace(TINY, image_size=24))
    assert torch.equal(three.pos_embed, state["pos_embed"])
    assert torch.equal(three.class_token, state["cls_token"])
    two = load_timm(state, replace(TINY, image_size=16))
    assert torch.equal(two.pos_embed, state["pos_embed"][:, 5:])
    assert torch.equal(two.class_token, state["cls_token"] + state["pos_embed"][:, :1])
    with pytest.raises(ValueError, match="pos_embed"):
        load_timm(state, TINY)


def test_a_model_that_is_another_function_is_refused() -> None:
    cfg = vit_s(depth=1, class_token=True)
    model = timm.create_model("vit_small_patch16_224", depth=1)
    with pytest.raises(ValueError, match="num_heads: expected 6, got 12"):
        load_timm(model, replace(cfg, num_heads=12))
    with pytest.raises(ValueError, match="VisionTransformer, got ResNet"):
        load_timm(timm.create_model("resnet18"), cfg)
    model.norm.eps = 1e-5
    with pytest.raises(ValueError, match="norm.eps: expected 1e-06, got 1e-05"):
        load_timm(model, cfg)
    quick = timm.create_model("vit_small_patch16_224", depth=1, act_layer="quick_gelu")
    with pytest.raises(ValueError, match="blocks.0.mlp.act: expected the exact GELU"):
        load_timm(quick, cfg)


def test_rotary_positions_are_refused() -> None:
    cfg = vit_demo(position="rotary")
    with pytest.raises(ValueError, match="position: expected absolute, .* got rotary"):
        to_timm(ViT(cfg))
    with pytest.raises(ValueError, match="position: expected absolute"):
        load_timm({}, cfg)
