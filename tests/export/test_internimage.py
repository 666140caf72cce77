"""InternImage's published files, built here key by key as the official scripts build them."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.export.internimage import load_internimage, save_internimage, to_layout
from m3i_fast.models.internimage.model import InternImage
from tests.shared.official_internimage import seeded_state

SMALL = InternImageConfig(
    channels=16,
    depths=(1, 1, 2, 1),
    groups=(1, 2, 4, 8),
    num_classes=5,
    layer_scale=1e-5,
    post_norm=True,
)
# as H and G: what pre-training files hold
PROJECTING = replace(
    SMALL,
    layer_scale=None,
    use_clip_projector=True,
    level2_post_norm=True,
    level2_post_norm_block_ids=(1,),
    center_feature_scale=True,
    token_dim=32,
    pool_heads=2,
    pooled_dim=16,
)
HEAD = ("conv_head.", "head.", "dcnv3_head", "clip_projector.", "fc_norm.")


def make(cfg: InternImageConfig) -> InternImage:
    model = InternImage(cfg)
    model.load_state_dict(seeded_state(model))
    return model.eval()


def detection(state: dict[str, Tensor]) -> dict[str, Any]:
    stages = {f"backbone.{k}": v for k, v in state.items() if not k.startswith(HEAD)}
    neck = {"neck.convs.0.weight": torch.ones(2, 2), "bbox_head.fc.bias": torch.ones(3)}
    return {"meta": {"epoch": 12, "CLASSES": ("cat",)}, "state_dict": stages | neck}


def huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def rename(key: str) -> str:
        if "gamma" in key:
            key = key.replace("gamma1", "layer_scale1").replace("gamma2", "layer_scale2")
        return "model." + key

    return {rename(key): value for key, value in state.items()}


def pretraining(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout before the joint model was taken apart, with the names that the ops had then."""
    old: dict[str, Tensor] = {"mask_token": torch.zeros(1, 1, 8), "mm_dcnv3.w": torch.ones(2)}
    classifier = {"fc_norm.0": "clip.classifier_ln", "head": "clip.classifier"}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if module in classifier:
            old[f"{classifier[module]}.{kind}"] = value
            continue
        key = key.replace("dcn.offset", "attn.sampling_offsets")
        key = key.replace("dcn.mask", "attn.attention_weights")
        key = key.replace("dcn.input_proj", "attn.value_proj").replace("dcn.", "attn.")
        key = key.replace("cross_dcn", "cross_attn")
        key = re.sub(r"(norm1_[qkv]|post_norms\.\d+)\.0\.", r"\1.", key)
        old[key if key.startswith(("clip_projector", "dcnv3_head")) else f"dcnv3.{key}"] = value
    return old | {"text.ema.w": torch.ones(1), "decoder.weight": torch.ones(2)}


FILES: dict[str, tuple[InternImageConfig, Callable[[dict[str, Tensor]], dict[str, Any]]]] = {
    "bare": (SMALL, lambda state: state),
    "classification": (SMALL, lambda state: {"model": state, "epoch": 300, "max_accuracy": 83.5}),
    "deepspeed": (SMALL, lambda state: {"module": state}),
    "huggingface": (SMALL, huggingface),
    "huggingface h": (PROJECTING, huggingface),
    "pre-training": (PROJECTING, pretraining),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("from_file", [False, True])
def test_every_layout_gives_the_same_model(name: str, from_file: bool, tmp_path: Path) -> None:
    cfg, pack = FILES[name]
    model = make(cfg)
    source: Any = pack(model.state_dict())
    if from_file:
        path = tmp_path / ("file.safetensors" if "huggingface" in name else "file.pth")
        write = save_file if "huggingface" in name else torch.save
        write(source, path)  # type: ignore[operator]
        source = path
    loaded = load_internimage(source, cfg).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_detectors_backbone_has_stages_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(SMALL)
    path = tmp_path / "detector.pth"
    torch.save(detection(model.state_dict()), path)
    with pytest.raises(ValueError, match=r"missing: conv_head\.0\.weight"):
        load_internimage(path, SMALL)
    with caplog.at_level(logging.INFO):
        loaded = load_internimage(str(path), SMALL, stages_only=True)
    assert "left out" in caplog.text and "bbox_head.fc.bias" in caplog.text
    images = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(
        loaded.forward_stages(images), model.forward_stages(images), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_an_encoder_takes_a_classifiers_weights_without_its_head() -> None:
    model = make(PROJECTING)
    encoder = load_internimage({"model": model.state_dict()}, replace(PROJECTING, num_classes=0))
    images = torch.randn(1, 3, 64, 64)
    expected = model.forward_features(images)
    assert torch.equal(encoder.eval()(images), expected.pooled)
    plain = make(replace(SMALL, layer_scale=None, use_clip_projector=False))
    pretrainable = replace(plain.cfg, use_clip_projector=True, num_classes=0, token_dim=32)
    stages = load_internimage(plain.state_dict(), pretrainable, stages_only=True)
    assert torch.equal(stages.forward_stages(images)[3], plain.forward_stages(images)[3])


def test_half_precision_is_widened() -> None:
    model = make(SMALL)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    loaded = load_internimage({"model": half}, SMALL)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_is_named_with_expected_and_got() -> None:
    state = make(SMALL).state_dict()
    state["levels.0.norm.0.weight"] = torch.ones(16)
    del state["levels.2.blocks.1.gamma2"]
    state["head.weight"] = torch.ones(1000, 192)
    with pytest.raises(ValueError) as error:
        load_internimage({"model": state}, SMALL)
    assert "missing: levels.2.blocks.1.gamma2" in str(error.value)
    assert "unexpected: levels.0.norm.0.weight" in str(error.value)
    assert "head.weight: expected [5, 192], got [1000, 192]" in str(error.value)
    with pytest.raises(ValueError, match=r"unexpected: .* and \d+ more"):
        load_internimage(state, replace(SMALL, layer_scale=None, depths=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="expected tensors by name, got others: epoch"):
        load_internimage({"epoch": 3}, SMALL)


def test_a_file_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    torch.save({"model": {}, "config": tmp_path}, path)  # a class that is not allowed
    with pytest.raises(ValueError, match=r"code\.pth: expected tensors and plain values only"):
        load_internimage(path, SMALL)
    torch.save([1], path)
    with pytest.raises(ValueError, match="expected a dictionary, got list"):
        load_internimage(path, SMALL)


@pytest.mark.parametrize("layout", ["classification", "detection", "huggingface"])
def test_a_saved_model_is_what_its_readers_expect(layout: Any, tmp_path: Path) -> None:
    model = make(SMALL)
    state = model.state_dict()
    path = tmp_path / ("model.safetensors" if layout == "huggingface" else "model.pth")
    save_internimage(model, path, layout)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    found = load_file(path) if layout == "huggingface" else torch.load(path, weights_only=True)
    expected: dict[str, Any] = {
        "classification": lambda: {"model": state},
        "detection": lambda: {
            "state_dict": {k: v for k, v in detection(state)["state_dict"].items() if "back" in k}
        },
        "huggingface": lambda: huggingface(state),
    }[layout]()
    inner = next(iter(expected.values()))
    if not isinstance(inner, Tensor):
        assert found.keys() == expected.keys()
        found, expected = next(iter(found.values())), inner
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    back = load_internimage(path, SMALL, stages_only=layout == "detection")
    key = "levels.3.blocks.0.gamma1"
    assert torch.equal(back.state_dict()[key], state[key])


def test_a_wrong_layout_or_name_is_refused(tmp_path: Path) -> None:
    model = make(SMALL)
    with pytest.raises(ValueError, match=r"ends in \.safetensors for the huggingface"):
        save_internimage(model, tmp_path / "model.pth", "huggingface")
    with pytest.raises(ValueError, match=r"layout: expected classification, .*, got 'onnx'"):
        to_layout(model, "onnx")  # type: ignore[arg-type]
