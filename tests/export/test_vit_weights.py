"""Weights of timm, DINOv2 and DINOv3 for our ViT: timm's own loader and features are the oracle."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter
from torch import nn

from m3i_fast.config.models import vit as sizes
from m3i_fast.config.models.vit import ViTConfig, vit_s
from m3i_fast.export.vit_names import Family
from m3i_fast.export.vit_weights import resample_patches, vit_weights
from m3i_fast.export.weight_files import read_weights, tensors_in
from m3i_fast.models.transformer.vit import ViT
from tests.shared.dino_files import State, dinov2_file, dinov3_file

SMALL = {"dim": 64, "depth": 2, "num_heads": 2}


def make_timm(name: str, image_size: int, dim: int = 64, **options: Any) -> Any:
    small = {"embed_dim": dim, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(name, img_size=image_size, **small | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def loaded(state: State, family: Family, cfg: ViTConfig) -> ViT:
    vit = ViT(cfg).eval()
    weights = vit_weights(state, family, cfg)
    assert not weights.new
    vit.load_state_dict(weights.tensors)
    return vit


def assert_features(vit: ViT, model: Any) -> None:
    images = torch.randn(2, 3, vit.cfg.image_size, vit.cfg.image_size)
    expected = model.forward_features(images)
    torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-5)


# ---- Files as DINOv2's and DINOv3's repositories write them --------------------------------------


DINOV2 = {
    "vit_small_patch14_dinov2": sizes.dinov2_s(num_registers=0, image_size=70, **SMALL),
    "vit_small_patch14_reg4_dinov2": sizes.dinov2_s(image_size=70, **SMALL),
    "vit_giant_patch14_reg4_dinov2": sizes.dinov2_g(image_size=70, **SMALL | {"dim": 96}),
}
DINOV3 = {
    "vit_small_patch16_dinov3_qkvb": sizes.dinov3_s(image_size=80, **SMALL),
    "vit_small_plus_patch16_dinov3_qkvb": sizes.dinov3_s_plus(image_size=80, **SMALL),
}


@pytest.mark.parametrize("name", DINOV2)
@pytest.mark.parametrize("image_size", [70, 42])
def test_dinov2s_files_give_timms_features(name: str, image_size: int) -> None:
    cfg = DINOV2[name]
    state = dinov2_file(cfg)
    model = make_timm(name, image_size, cfg.dim)
    model.load_state_dict(vit_filter(dict(state), model))
    vit = loaded(state, "dinov2", replace(cfg, image_size=image_size))
    assert_features(vit, model)


@pytest.mark.parametrize("name", DINOV3)
def test_dinov3s_files_give_timms_features(name: str) -> None:
    cfg = DINOV3[name]
    state = dinov3_file(cfg)
    model = make_timm(name, cfg.image_size)
    model.load_state_dict(eva_filter(dict(state), model))
    weights = vit_weights(state, "dinov3", cfg)
    assert "mask_token" in weights.left_out and "rope_embed.periods" in weights.left_out
    assert_features(loaded(state, "dinov3", cfg), model)
    whole = loaded(state, "dinov3", replace(cfg, key_bias=True))  # a bias of zeros to train
    assert not whole.state_dict()["blocks.1.layernorm_qkv.bias"][64:128].any()
    assert_features(whole, model)


def test_a_training_runs_teacher_is_read_with_its_prefix_and_chunks(tmp_path: Path) -> None:
    cfg = DINOV2["vit_small_patch14_reg4_dinov2"]
    state = dinov2_file(cfg)
    saved = {
        "backbone." + re.sub(r"^blocks\.(\d+)", r"blocks.0.\1", name): value
        for name, value in state.items()
    }
    torch.save({"teacher": saved | {"dino_head.weight": torch.ones(2)}}, tmp_path / "teacher.pth")
    found = tensors_in(read_weights(tmp_path / "teacher.pth"))
    plain, from_run = (vit_weights(each, "dinov2", cfg).tensors for each in (state, found))
    assert plain.keys() == from_run.keys()
    assert all(torch.equal(plain[name], value) for name, value in from_run.items())


# ---- timm's own files, in other sizes and with other options -------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "cfg"),
    [
        ("vit_small_patch16_224", {}, vit_s(image_size=80, class_token=True, **SMALL)),
        (
            "vit_small_patch16_224",
            {"reg_tokens": 3},
            vit_s(image_size=80, class_token=True, num_registers=3, **SMALL),
        ),
        (
            "vit_small_patch16_224",
            {"class_token": False, "global_pool": "avg", "qkv_bias": False},
            vit_s(image_size=80, final_norm=False, **SMALL),
        ),
        ("vit_small_patch14_dinov2", {}, DINOV2["vit_small_patch14_dinov2"]),
    ],
)
def test_options_that_are_written_otherwise_leave_the_features(
    name: str, options: dict[str, Any], cfg: ViTConfig
) -> None:
    """LayerScale that one side lacks, and biases of queries, keys and values, of keys or none."""
    model = make_timm(name, cfg.image_size, **options)
    state = model.state_dict()
    assert_features(loaded(state, "timm", cfg), model)
    scaled = replace(cfg, layer_scale_init=None if cfg.layer_scale_init else 1e-5)
    assert_features(loaded(state, "timm", scaled), model)
    assert_features(loaded(state, "timm", replace(cfg, key_bias=False)), model)
    changes = vit_weights(state, "timm", scaled).changes
    expected = {"blocks.0.proj.weight": "multiplied by blocks.0.ls1.gamma"}
    assert changes.items() >= (expected if cfg.layer_scale_init else {}).items()


@pytest.mark.parametrize("patch", [8, 14, 32])
def test_patches_are_resampled_as_timm(patch: int) -> None:
    weight = torch.randn(6, 3, 16, 16)
    expected = resample_patch_embed(weight, [patch, patch])
    torch.testing.assert_close(resample_patches(weight, patch), expected, atol=1e-5, rtol=1e-4)


def test_larger_patches_of_larger_images_give_the_same_tokens() -> None:
    weight, image = torch.randn(5, 3, 8, 8), torch.randn(1, 3, 8, 8)
    larger = nn.functional.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    token = (resample_patches(weight, 16) * larger).sum((1, 2, 3))
    torch.testing.assert_close(token, (weight * image).sum((1, 2, 3)), atol=1e-4, rtol=1e-4)


def test_other_sizes_of_image_and_patch_are_those_of_timms_loader() -> None:
    """A file of patches of 16 and a grid of 5 for patches of 8 and a grid of 7, once by timm."""
    source = make_timm("vit_small_patch16_224", 80)
    model = make_timm("vit_small_patch8_224", 56)
    model.load_state_dict(vit_filter(source.state_dict(), model))
    cfg = vit_s(image_size=56, patch_size=8, class_token=True, **SMALL)
    weights = vit_weights(source.state_dict(), "timm", cfg)
    assert weights.changes["patch_embed.weight"].startswith("16 x 16 -> 8 x 8 pixels")
    assert weights.changes["pos_embed"].startswith("5 x 5 -> 7 x 7 patches")
    assert_features(loaded(source.state_dict(), "timm", cfg), model)


def test_tokens_before_the_patches_may_be_left_out_or_new() -> None:
    state = make_timm("vit_small_patch16_224", 80).state_dict()
    weights = vit_weights(state, "timm", vit_s(image_size=80, **SMALL))
    assert weights.left_out == ["cls_token"] and not weights.new
    cfg = vit_s(image_size=80, class_token=True, num_registers=2, **SMALL)
    assert vit_weights(state, "timm", cfg).new == ["register_tokens"]


def test_halves_are_widened() -> None:
    state = make_timm("vit_small_patch16_224", 80).bfloat16().state_dict()
    weights = vit_weights(state, "timm", vit_s(image_size=80, class_token=True, **SMALL))
    assert {value.dtype for value in weights.tensors.values()} == {torch.float32}


# ---- Refusals ------------------------------------------------------------------------------------


def test_another_network_is_refused_with_the_flags_that_make_it_one() -> None:
    with torch.device("meta"):
        state = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0).state_dict()
    state = {name: torch.empty(value.shape, device="meta") for name, value in state.items()}
    with pytest.raises(ValueError) as error:
        vit_weights(state, "timm", vit_s(class_token=True))
    said = str(error.value)
    assert "dim 384, num_heads 6, got a file nearest to dinov2_b, dim 768, num_heads 12" in said
    assert said.endswith("add --vision.dim 768 --vision.num-heads 12")


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        ({"depth": 3}, "--vision.depth 2"),
        ({"mlp_ratio": 2.0}, "--vision.mlp-ratio 4.0"),
        ({"mlp": "swiglu"}, "--vision.mlp gelu"),
        ({"position": "rotary"}, "--vision.position absolute"),
        ({"norm_eps": 1e-5}, "--vision.norm-eps 1e-06"),
        ({"num_registers": 3}, "--vision.num-registers 4"),
    ],
)
def test_each_field_that_differs_has_its_flag(changed: dict[str, Any], flags: str) -> None:
    cfg = DINOV2["vit_small_patch14_reg4_dinov2"]
    state = dinov2_file(cfg)
    with pytest.raises(ValueError) as error:
        vit_weights(state, "dinov2", replace(cfg, **changed))
    assert str(error.value).endswith(f": add {flags}"), error.value


def test_a_bias_that_the_config_cannot_have_is_refused() -> None:
    cfg = DINOV3["vit_small_patch16_dinov3_qkvb"]
    state = dinov3_file(cfg)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.bias: .* --vision\.qkv-bias"):
        vit_weights(state, "dinov3", replace(cfg, qkv_bias=False))
    unmasked = {name: value for name, value in state.items() if not name.endswith("bias_mask")}
    with pytest.raises(ValueError, match=r"expected zeros for keys: add --vision\.key-bias"):
        vit_weights(unmasked, "dinov3", cfg)


def test_a_file_of_another_family_is_told_apart() -> None:
    cfg = DINOV3["vit_small_patch16_dinov3_qkvb"]
    with pytest.raises(ValueError, match="storage_tokens, which is a name of dinov3: type dinov3:"):
        vit_weights(dinov3_file(cfg), "timm", cfg)
    resnet = timm.create_model("resnet18").state_dict()
    with pytest.raises(ValueError, match=r"expected the names of timm.* got conv1\.weight, bn1"):
        vit_weights(resnet, "timm", cfg)
    with pytest.raises(ValueError, match="got no tensor"):
        vit_weights({}, "timm", cfg)
    state = make_timm("vit_small_patch16_224", 80, qk_norm=True).state_dict()
    with pytest.raises(ValueError, match=r"more in it: blocks\.0\.attn\.q_norm\.weight"):
        vit_weights(state, "timm", vit_s(image_size=80, class_token=True, **SMALL))
    rotary = make_timm("vit_small_patch16_rope_224", 80).state_dict()
    with pytest.raises(ValueError, match="by which angles"):
        vit_weights(rotary, "timm", cfg)


def test_a_table_that_fits_no_grid_is_refused() -> None:
    cfg = DINOV2["vit_small_patch14_reg4_dinov2"]
    state = dinov2_file(cfg) | {"pos_embed": torch.zeros(1, 28, 64)}
    with pytest.raises(ValueError, match="pos_embed: expected .* none or 1 before them, got 28"):
        vit_weights(state, "dinov2", cfg)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth: expected a file of weights"):
        read_weights(tmp_path / "nowhere.pth")
    for name in ("torn.safetensors", "torn.pth"):
        (tmp_path / name).write_bytes(b"not a file of weights")
        with pytest.raises(ValueError, match=f"{name}: expected"):
            read_weights(tmp_path / name)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert torch.equal(tensors_in(read_weights(tmp_path / "a.safetensors"))["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_rope_reg1_gap_256", "rotary positions that are not DINOv3's"),
        ("vit_small_patch16_rope_ape_224", "rope_ape"),
        ("vit_small_patch16_rope_224", "neither a pos_embed nor a register_tokens"),
        ("vit_pe_core_tiny_patch16_384", "PE-Core"),
        ("vit_pe_spatial_tiny_patch16_512", "PE-Spatial"),
        ("eva02_tiny_patch14_224", "EVA-02"),
    ],
)
def test_models_that_turn_otherwise_than_dinov3_are_refused(name: str, message: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    cfg = sizes.dinov3_b() if "base" in name else vit_s()
    with pytest.raises(ValueError, match=message):
        vit_weights(state, "timm", cfg)


def test_rotary_positions_without_a_class_token_are_refused() -> None:
    state = make_timm("vit_small_patch16_dinov3", 80).state_dict()
    del state["cls_token"]
    with pytest.raises(ValueError, match="neither a pos_embed nor a class_token"):
        vit_weights(state, "timm", sizes.dinov3_s(image_size=80, **SMALL))
