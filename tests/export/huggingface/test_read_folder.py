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

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig, dinov2_s, dinov3_s, dinov3_s_plus
from m3i_fast.export.huggingface.read_folder import read_folder
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD

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
CLIP = replace(WITH_CLASS, pre_norm=True, norm_eps=1e-5)
TEXT = TextConfig(
    **{"vocab_size": 64, "context_length": 16, "dim": 32, "depth": 2, "num_heads": 2},
    **{"embed_dim": 24, "attention": "causal", "mlp": "quick_gelu", "norm_eps": 1e-5},
)
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
    "siglip": ("SiglipVision", MLP, replace(PLAIN, mlp="gelu_tanh")),
    "siglip of the exact GELU": ("SiglipVision", MLP | {"hidden_act": "gelu"}, PLAIN),
    "clip": ("CLIPVision", MLP, replace(CLIP, mlp="quick_gelu")),
    "clip of the exact GELU": (
        "CLIPVision",
        MLP | {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
        replace(CLIP, norm_eps=1e-6),
    ),
    "vit of tanh's GELU": (
        "ViT",
        MLP | {"hidden_act": "gelu_pytorch_tanh"},
        replace(WITH_CLASS, norm_eps=1e-12, mlp="gelu_tanh"),
    ),
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
    weights = read_folder(folder, cfg).image
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
    if type(model).__name__ == "CLIPVisionModel":  # which norms the class token alone
        tokens = model.post_layernorm(tokens)
    return tokens


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    name, options, cfg = CASES[case]
    model = made(name, options, tmp_path)
    vit, pictures = loaded(tmp_path, cfg), torch.randn(2, 3, 32, 32)
    expected = features(model, pictures)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(vit(pictures), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["vit", "dinov2", "dinov3_vit", "siglip", "clip"])
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
    weights = read_folder(tmp_path / "classifier", cfg).image
    assert {"classifier.weight", "classifier.bias"} <= {*weights.left_out}
    got = loaded(tmp_path / "classifier", cfg)(pictures)
    expected = features(classifier.eval().dinov2, pictures)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def clip(folder: Path, **text: Any) -> Any:
    """Save a CLIP of random weights with both towers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config={**sizes, "eos_token_id": 63, **text},
        vision_config=SIZES | MLP,
        projection_dim=24,
    )
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "hidden_act": "gelu"}, {"mlp": "gelu"}),
        ({"layer_norm_eps": 1e-4}, {"norm_eps": 1e-4, "vocab_size": 40, "context_length": 9}),
    ],
)
@torch.no_grad()
def test_both_towers_of_clip_are_taken(
    text: dict[str, Any], ours: dict[str, Any], tmp_path: Path
) -> None:
    model, cfg = clip(tmp_path, **text), replace(TEXT, **ours)
    found = read_folder(tmp_path, replace(CLIP, mlp="quick_gelu"), cfg)
    assert found.text is not None and not found.text.new and not found.without_text
    assert {*found.image.left_out} == {"logit_scale", "visual_projection.weight"}
    encoder = TextEncoder(cfg).eval()
    encoder.load_state_dict(found.text.tensors)
    counts = torch.tensor([5, cfg.context_length, 2])
    place = torch.arange(cfg.context_length)
    ids = torch.randint(3, cfg.vocab_size - 2, (3, cfg.context_length))
    ids = ids.masked_fill(place >= counts[:, None], 0)
    end = place == counts[:, None] - 1
    theirs = model.get_text_features(ids.masked_fill(end, 63)).pooler_output
    got = encoder(ids.masked_fill(end, cfg.vocab_size - 1), counts)
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-5)
    vit, pictures = loaded(tmp_path, replace(CLIP, mlp="quick_gelu")), torch.randn(1, 3, 32, 32)
    expected = features(model.vision_model, pictures)
    torch.testing.assert_close(vit(pictures), expected, rtol=0, atol=1e-5)


def test_texts_that_are_left_out_say_why(tmp_path: Path) -> None:
    vision = replace(CLIP, mlp="quick_gelu")
    clip(tmp_path)
    for text, said in (
        (None, "the run has no captions"),
        (replace(TEXT, attention="bidirectional"), "add --text.attention causal"),
        (replace(TEXT, mlp="gelu", num_heads=4), "add --text.num-heads 2 --text.mlp quick_gelu"),
        (replace(TEXT, vocab_size=65), "pack the data with at most as many"),
    ):
        found = read_folder(tmp_path, vision, text)
        assert found.text is None and said in found.without_text
    clip(tmp_path / "other", eos_token_id=7)
    found = read_folder(tmp_path / "other", vision, TEXT)
    assert "eos_token_id: expected the last id, 63, got 7" in found.without_text


def test_pixels_that_a_folder_normalises_otherwise_are_embedded_alike(tmp_path: Path) -> None:
    """Features are those of the same picture, normalised by each as it has it."""
    name, options, cfg = CASES["clip"]
    model = made(name, options, tmp_path)
    processor = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, do_convert_rgb=False
    )
    processor.save_pretrained(tmp_path)
    vit = loaded(tmp_path, cfg)
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    ours = (picture / 255 - mean) / std
    assert (ours - pixels[0]).abs().max() > 0.02
    got = vit(ours[None])
    torch.testing.assert_close(got, features(model, pixels), rtol=0, atol=2e-5)


def test_pixels_without_statistics_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that were not normalised are taken as they are; one number is of all channels."""
    name, options, cfg = CASES["vit"]
    model = made(name, options, tmp_path)
    loaded(tmp_path, cfg)
    assert "expected image_mean and image_std, found none: pixels are taken as" in caplog.text
    picture = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    for said, theirs in (
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, picture),
        ({"image_mean": 0.5, "image_std": 0.25}, (picture - 0.5) / 0.25),
        ({"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}, picture),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        caplog.clear()
        got = loaded(tmp_path, cfg)((picture - mean) / std)
        torch.testing.assert_close(got, features(model, theirs), rtol=0, atol=2e-5)
        assert not caplog.text
    for wrong in ({"image_mean": [0.5] * 2, "image_std": 1.0}, {"image_mean": 0.5, "image_std": 0}):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="pixels: expected one or three means"):
            read_folder(tmp_path, cfg)


def test_shards_and_pickles_are_read(tmp_path: Path) -> None:
    name, options, cfg = CASES["dinov2_with_registers"]
    made(name, options, tmp_path / "whole")
    made(name, options, tmp_path / "shards", max_shard_size="100KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    first, second = (read_folder(tmp_path / name, cfg) for name in ("whole", "shards"))
    assert first.sha256 != second.sha256 and len(first.sha256) == len(second.sha256) == 64
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((tmp_path / "whole/config.json").read_text())
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "whole/model.safetensors"), tmp_path / "old/pytorch_model.bin")
    old, whole = read_folder(tmp_path / "old", cfg).image, first.image
    for found in (second.image, old):
        assert found.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(found.tensors[n], value) for n, value in whole.tensors.items())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "ViT",
            MLP | {"hidden_act": "gelu_new"},
            "hidden_act: expected gelu or gelu_pytorch_tanh or .* got gelu_new",
        ),
        (
            "CLIPVision",
            MLP,
            "add --vision.mlp quick_gelu --vision.pre-norm --vision.norm-eps 1e-05",
        ),
        ("SiglipVision", MLP, "add --vision.mlp gelu_tanh"),
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
