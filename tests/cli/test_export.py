"""What a run has learnt, read by timm and by `load`: equal features in no more bytes."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import m3i_fast
from m3i_fast.cli import main
from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.export.timm_folder import architecture, save_timm_folder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.recipes import demo_internimage, shrink
from tests.shared.engine.small_run import TEXT, small_run


def trained(cfg: TrainConfig, out: Path) -> Path:
    cfg = replace(cfg, num_steps=1, log_every=1, checkpoint_every=1, num_threads=1)
    Trainer(cfg, out).train()
    return out


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = small_run(dataset)
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(cfg.vision, class_token=True, num_registers=2, layer_scale_init=0.1)
    return trained(replace(cfg, vision=vision), tmp_path_factory.mktemp("export") / "run")


@pytest.mark.parametrize("which", ["trained", "ema"])
def test_timm_computes_the_features(
    run: Path, tmp_path: Path, which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder"
    assert main(["export", str(run), str(out), "--to", "timm", "--which", which]) == 0
    said = capsys.readouterr().out
    assert ("heads of classes" in said) == ("--which ema" in said) == (which == "trained")
    ours = m3i_fast.load(run, which=which, device="cpu")  # type: ignore[arg-type]
    config = json.loads((out / "config.json").read_text())
    by_folder = timm.create_model(f"local-dir:{out}", pretrained=True)
    by_file = timm.create_model(
        config["architecture"], checkpoint_path=out / "model.safetensors", **config["model_args"]
    )
    pictures = torch.randn(3, 3, 32, 32)
    for theirs in (by_folder.eval(), by_file.eval()):
        with torch.no_grad():
            tokens, vector = theirs.forward_features(pictures), theirs(pictures)
        torch.testing.assert_close(ours.forward_features(pictures), tokens, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours(pictures), vector, rtol=0, atol=1e-4)
        assert theirs.num_features == ours.num_features
        assert theirs.num_prefix_tokens == ours.num_prefix_tokens == 3


def test_timm_prepares_pictures_alike(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder"
    assert main(["export", str(run), str(out), "--to", "timm"]) == 0
    theirs = create_transform(
        **resolve_model_data_config(timm.create_model(f"local-dir:{out}", pretrained=True))
    )
    ours = m3i_fast.load(run, device="cpu").transform
    ramp = torch.arange(48 * 48, dtype=torch.float32).view(48, 48) * (255 / 48**2)
    picture = Image.fromarray(ramp.byte().numpy()).convert("RGB")
    level = 1 / (255 * min(ours.preprocessing.std))
    torch.testing.assert_close(theirs(picture), ours(picture), rtol=0, atol=1.01 * level)
    wide = theirs(Image.new("RGB", (90, 40), "red"))
    torch.testing.assert_close(wide, ours(Image.new("RGB", (90, 40), "red")), rtol=0, atol=1e-6)


def test_the_architecture_is_that_of_the_width() -> None:
    named = ViTConfig(dim=384, num_heads=6), ViTConfig(dim=1024, patch_size=14, num_heads=16)
    assert [architecture(cfg) for cfg in named] == [
        "vit_small_patch16_224",
        "vit_large_patch14_224",
    ]
    assert architecture(ViTConfig(dim=32, patch_size=8, num_heads=2)) == "vit_base_patch8_224"
    assert architecture(ViTConfig(dim=32, patch_size=7, num_heads=2)) == "vit_base_patch16_224"


def test_a_small_folder_is_the_run_without_what_only_training_needs(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folder"
    assert main(["export", str(run), str(out), "--to", "safetensors"]) == 0
    picture = Image.new("RGB", (50, 40), "red")
    for which in ("trained", "ema"):
        ours, theirs = (m3i_fast.load(at, which=which, device="cpu") for at in (run, out))  # type: ignore[arg-type]
        assert torch.equal(ours(picture), theirs(picture))
        assert theirs.class_names == ours.class_names
    ours, theirs = (m3i_fast.load(at, device="cpu") for at in (run, out))
    assert torch.equal(ours.encode_text("an apple"), theirs.encode_text("an apple"))
    assert torch.equal(ours.classify(picture), theirs.classify(picture))
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "data.json",
        "model.safetensors",
    ]
    parameters = sum(p.numel() for p in theirs.parameters())
    average = sum(p.numel() for p in theirs.encoder.parameters())
    size = (out / "model.safetensors").stat().st_size
    assert 4 * (parameters + average) < size < 4 * (parameters + average) + 20_000


def test_a_hint_comes_after_what_it_is_about(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = shutil.copytree(run, tmp_path / "run")
    for weights in spoilt.glob("checkpoints/*/model/*"):
        weights.write_bytes(b"")
    assert main(["export", str(spoilt), str(tmp_path / "out"), "--to", "timm"]) == 2
    said = capsys.readouterr()
    assert "no good checkpoint" in said.err and "--which ema" not in said.out


def test_what_cannot_be_exported_is_refused(
    run: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "exists already" in refused(str(run), str(tmp_path), "--to", "timm")
    out = str(tmp_path / "out")
    assert f"no run in {tmp_path}: expected" in refused(str(tmp_path), out, "--to", "timm")
    said = refused(str(run), out, "--to", "timm", "--data", str(dataset))
    expected = "hf, open_clip, onnx, torch-export, aoti or safetensors alone, got --to timm"
    assert f"--data: expected with --to {expected}" in said
    said = refused(str(run), out, "--to", "safetensors", "--which", "ema")
    assert "--which: expected with --to timm, hf, internimage" in said
    assert "--image-only: expected with --to hf" in refused(
        str(run), out, "--to", "timm", "--image-only"
    )
    classifier = ["--to", "hf", "--task", "image-classification", "--image-only"]
    assert "--image-only: expected with --task encoders" in refused(str(run), out, *classifier)
    cfg = shrink(demo_internimage(), path=dataset, num_classes=9, text=TEXT)
    other = trained(cfg, tmp_path / "internimage")
    said = refused(str(other), out, "--to", "timm")
    assert "expected a run with a ViT, got InternImage" in said
    older = shutil.copytree(run, tmp_path / "older")
    (older / "data.json").unlink()
    moved = TrainConfig.load(older / "config.json")
    replace(moved, data=replace(moved.data, path=tmp_path / "gone")).save(older / "config.json")
    assert "m3i-fast export --data DIR" in refused(str(older), out, "--to", "safetensors")
    assert not Path(out).exists()
    assert main(["export", str(older), out, "--to", "safetensors", "--data", str(dataset)]) == 0
    assert (Path(out) / "data.json").read_bytes() == (run / "data.json").read_bytes()


def test_without_timm_its_extra_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["export", str(run), str(tmp_path / "out"), "--to", "timm"]) == 2
    assert 'timm is not installed: pip install "m3i-fast[timm]"' in capsys.readouterr().err


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_full_disk_leaves_no_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    out = tmp_path / "new" / "folder"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # below that of the weights
    try:
        assert main(["export", str(run), str(out), "--to", to]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "model.safetensors: not written: " in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []
    assert main(["export", str(run), str(out), "--to", to]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp": "swiglu"}, "vision.mlp: expected gelu or .* got swiglu; use --to safetensors"),
        ({"norm_eps": 1e-3}, "vision.norm_eps: expected 1e-06 or 1e-05, .* got 0.001"),
    ],
)
def test_layers_that_a_timm_config_cannot_name_are_refused(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    cfg = replace(ViTConfig(dim=32, depth=1, num_heads=2, patch_size=8, image_size=16), **changes)  # type: ignore[arg-type]
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "cubic"}
    with pytest.raises(ValueError, match=said):
        save_timm_folder(ViT(cfg), tmp_path / "folder", **statistics)  # type: ignore[arg-type]
    assert not (tmp_path / "folder").exists()
