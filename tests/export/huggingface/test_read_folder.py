"""Folders that transformers writes, as weights of our ViT: its own models are the oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from m3i_fast.config.models.vit import ViTConfig, dinov2_s, dinov3_s, dinov3_s_plus
from m3i_fast.export.huggingface.read_folder import read_folder
from m3i_fast.models.transformer.vit import ViT

SIZES: dict[str, Any] = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8},
}
MLP = {"intermediate_size": 192}
OURS: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "num_heads": 2}
}
PLAIN = ViTConfig(**OURS)
WITH_CLASS = replace(PLAIN, class_token=True)
# name of the class, arguments of its config, ours for it
CASES: dict[str, tuple[str, dict[str, Any], ViTConfig]] = {
    "vit": ("ViT", MLP, replace(WITH_CLASS, norm_eps=1e-12)),
    "vit without bias": (
        "ViT",
        MLP | {"qkv_bias": False, "layer_norm_eps": 1e-6},
        replace(WITH_CLASS, qkv_bias=False),
    ),
    "vit_mae": ("ViTMAE", MLP | {"mask_ratio": 0.0}, replace(WITH_CLASS, norm_eps=1e-12)),
    "ijepa": ("IJepa", MLP | {"layer_norm_eps": 1e-6}, PLAIN),
    "dinov2": ("Dinov2", {}, dinov2_s(**OURS, num_registers=0)),
    "dinov2 of SwiGLU": (
        "Dinov2",
        {"use_swiglu_ffn": True},
        dinov2_s(**OURS, num_registers=0, mlp="swiglu", mlp_ratio=128 / 48),
    ),
    "dinov2_with_registers": ("Dinov2WithRegisters", {}, dinov2_s(**OURS)),
    "dinov3_vit": ("DINOv3ViT", MLP | {"num_register_tokens": 4}, dinov3_s(**OURS)),
    "dinov3_vit of SwiGLU and all biases": (
        "DINOv3ViT",
        MLP
        | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu", "key_bias": True},
        dinov3_s_plus(**OURS, key_bias=True),
    ),
    "siglip": ("SiglipVision", MLP | {"hidden_act": "gelu"}, PLAIN),
}


def made(name: str, options: dict[str, Any], folder: Path, **how: Any) -> Any:
    """Save a model of random weights, as its class writes it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder, **how)
    return model.eval()


def loaded(folder: Path, cfg: ViTConfig) -> ViT:
    vit = ViT(cfg).eval()
    weights, _ = read_folder(folder, cfg)
    assert not weights.new
    vit.load_state_dict(weights.tensors)
    return vit


@torch.no_grad()
def features(model: Any, pictures: Tensor) -> Tensor:
    more = {}
    if type(model).__name__ == "ViTMAEModel":  # which shuffles the patches by this
        patches = (pictures.shape[-1] // 8) ** 2
        more["noise"] = torch.arange(patches, dtype=torch.float32).expand(len(pictures), -1)
    tokens: Tensor = model(pixel_values=pictures, **more).last_hidden_state
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, options, cfg = CASES[case]
    model = made(name, options, tmp_path)
    vit, pictures = loaded(tmp_path, cfg), torch.randn(2, 3, 32, 32)
    expected = features(model, pictures)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(vit(pictures), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["vit", "dinov2", "dinov3_vit"])
def test_what_a_config_leaves_out_is_the_default_of_the_class(case: str, tmp_path: Path) -> None:
    name, options, cfg = CASES[case]
    made(name, options, tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    eps = tree.pop("layer_norm_eps")
    del tree["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert eps == cfg.norm_eps
    loaded(tmp_path, cfg)
    with pytest.raises(ValueError, match=f"add --vision.norm-eps {eps}"):
        read_folder(tmp_path, replace(cfg, norm_eps=3e-6))


def test_a_model_with_heads_and_text_gives_its_image_encoder(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 64}
    vision = SIZES | MLP | {"hidden_act": "gelu"}
    model = transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    )
    model.save_pretrained(tmp_path / "siglip")
    pictures = torch.randn(1, 3, 32, 32)
    expected = features(model.eval().vision_model, pictures)
    got = loaded(tmp_path / "siglip", PLAIN)(pictures)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

    config = transformers.Dinov2Config(**SIZES, num_labels=3)
    classifier = transformers.Dinov2ForImageClassification(config)
    classifier.save_pretrained(tmp_path / "classifier")
    cfg = dinov2_s(**OURS, num_registers=0)
    weights, _ = read_folder(tmp_path / "classifier", cfg)
    assert {"classifier.weight", "classifier.bias"} <= {*weights.left_out}
    got = loaded(tmp_path / "classifier", cfg)(pictures)
    expected = features(classifier.eval().dinov2, pictures)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_shards_and_pickles_are_read(tmp_path: Path) -> None:
    name, options, cfg = CASES["dinov2_with_registers"]
    made(name, options, tmp_path / "whole")
    made(name, options, tmp_path / "shards", max_shard_size="100KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    whole, digest = read_folder(tmp_path / "whole", cfg)
    shards, other = read_folder(tmp_path / "shards", cfg)
    assert digest != other and len(digest) == len(other) == 64
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "whole/model.safetensors"), tmp_path / "old/pytorch_model.bin")
    old, _ = read_folder(tmp_path / "old", cfg)
    for found in (shards, old):
        assert found.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(found.tensors[n], value) for n, value in whole.tensors.items())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("CLIPVision", MLP, r"got clip_vision_model: .*pre_layrnorm.*QuickGELU"),
        ("ViT", MLP | {"hidden_act": "gelu_new"}, "hidden_act: expected gelu, .* got gelu_new"),
        ("SiglipVision", MLP, "hidden_act: expected gelu, .* got gelu_pytorch_tanh"),
        ("DINOv3ViT", MLP | {"rope_theta": 50.0}, "rope_theta: expected 100, got 50"),
        ("DeiT", MLP, r"model_type of vit, .*got 'deit'"),
    ],
)
def test_another_network_is_refused(
    name: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made(name, options, tmp_path)
    with pytest.raises(ValueError, match=said):
        read_folder(tmp_path, WITH_CLASS)


def test_other_sizes_are_refused_with_the_flags(tmp_path: Path) -> None:
    made("ViT", MLP, tmp_path)
    with pytest.raises(ValueError, match="nearest to vit_ti, .*add --vision.num-heads 2 .*1e-12"):
        read_folder(tmp_path, replace(WITH_CLASS, num_heads=3))


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found no config.json"):
        read_folder(tmp_path, WITH_CLASS)
    made("Dinov2", {}, tmp_path)
    cfg = dinov2_s(**OURS, num_registers=0)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    extra = state | {"encoder.layer.1.norm3.weight": torch.ones(48)}
    save_file(extra, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"got more in it: encoder\.layer\.1\.norm3\.weight"):
        read_folder(tmp_path, cfg)
    del state["encoder.layer.1.attention.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.proj\.weight"):
        read_folder(tmp_path, cfg)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or pytorch_model"):
        read_folder(tmp_path, cfg)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected names of files beside it"):
        read_folder(tmp_path, cfg)
