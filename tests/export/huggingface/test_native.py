"""ViTs as classes of transformers: features equal, no weight is missing or left over."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from m3i_fast.config.models.vit import ViTConfig, dinov2_g, dinov3_s_plus
from m3i_fast.export.huggingface.native import native_model, no_class_for
from m3i_fast.export.huggingface.read_folder import read_folder
from m3i_fast.export.huggingface.save import save_folder
from m3i_fast.models.transformer.vit import ViT

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "num_heads": 2}
PLAIN = ViTConfig(**SMALL)
DINOV2 = dinov2_g(**SMALL)
DINOV3 = dinov3_s_plus(**SMALL)
CASES: dict[str, tuple[str, ViTConfig]] = {
    "plain": ("IJepaModel", PLAIN),
    "scaled, no bias of keys": (
        "IJepaModel",
        replace(PLAIN, layer_scale_init=0.1, key_bias=False, norm_eps=1e-5, mlp_ratio=3.5),
    ),
    "tanh": ("IJepaModel", replace(PLAIN, mlp="gelu_tanh")),
    "no bias": ("IJepaModel", replace(PLAIN, qkv_bias=False)),
    "class token": ("Dinov2WithRegistersModel", replace(PLAIN, class_token=True)),
    "one register": ("Dinov2WithRegistersModel", replace(PLAIN, num_registers=1)),
    "registers alone": (
        "Dinov2WithRegistersModel",
        replace(PLAIN, num_registers=3, mlp_ratio=2.7, qkv_bias=False),
    ),
    "DINOv2": ("Dinov2WithRegistersModel", DINOV2),
    "padded SwiGLU": ("Dinov2WithRegistersModel", replace(DINOV2, mlp_ratio=1.7, key_bias=False)),
    "DINOv3": ("DINOv3ViTModel", DINOV3),
    "DINOv3 of all biases, GELU": (
        "DINOv3ViTModel",
        replace(DINOV3, key_bias=True, mlp="gelu", num_registers=0, layer_scale_init=None),
    ),
    "DINOv3 of no bias": (
        "DINOv3ViTModel",
        replace(DINOV3, qkv_bias=False, class_token=False, num_registers=2),
    ),
}


def random_vit(cfg: ViTConfig) -> ViT:
    torch.manual_seed(0)
    vit = ViT(cfg).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return vit


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_the_class(case: str, tmp_path: Path) -> None:
    name, cfg = CASES[case]
    vit, out = random_vit(cfg), tmp_path / "folder"
    native = native_model(vit)
    save_folder(out, config=native.config, weights=native.state, files={})
    model, said = AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == native.class_name == name
    assert not any(said.values()), said
    sizes: list[tuple[int, int]] = [(32, 32)]
    if name != "IJepaModel":  # which resamples without antialiasing, and only if told to
        sizes.append((24, 40))
    for size in sizes:
        pictures = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected, got = vit(pictures), model.eval()(pictures).last_hidden_state
        assert expected.abs().mean() > 0.1
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["scaled, no bias of keys", "padded SwiGLU", "DINOv3"])
def test_a_folder_begins_a_run_of_the_same_features(case: str, tmp_path: Path) -> None:
    """What was exported is read back, padding and all, with the class token as the class has it."""
    cfg = CASES[case][1]
    vit = random_vit(cfg)
    native = native_model(vit)
    save_folder(tmp_path / "folder", config=native.config, weights=native.state, files={})
    width = native.state.get("encoder.layer.0.mlp.weights_out.weight")
    ratio = cfg.mlp_ratio if width is None else width.shape[1] / cfg.dim
    again = ViT(replace(cfg, mlp_ratio=ratio)).eval()
    weights = read_folder(tmp_path / "folder", again.cfg).image
    assert not weights.new
    again.load_state_dict(weights.tensors)
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(pictures), vit(pictures), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (replace(PLAIN, final_norm=False), "final_norm False"),
        (replace(PLAIN, pre_norm=True), "vision.pre_norm.*without the norm after the last"),
        (replace(PLAIN, position="rotary"), "rotary positions have a class token"),
        (replace(PLAIN, mlp="swiglu"), "SwiGLU have a class token"),
    ],
)
def test_what_no_class_computes_is_told(cfg: ViTConfig, said: str) -> None:
    assert re.search(said, no_class_for(cfg))
    with pytest.raises(ValueError, match=said):
        native_model(ViT(cfg))
