"""Teachers: tokens equal those of the run or the timm model they came from; refusals name why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig, vit_demo
from m3i_fast.engine.evaluator import load_objective
from m3i_fast.engine.teacher import load_teacher
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.recipes import demo, demo_internimage, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
STUDENT = ViTConfig(image_size=64, patch_size=16, dim=32, depth=1, num_heads=2)
NAME = "deit_tiny_patch16_224"


def _train(recipe: Callable[[], TrainConfig], dataset: Path, out: Path) -> TrainConfig:
    cfg = shrink(recipe(), path=dataset, num_classes=9, text=TEXT)
    Trainer(replace(cfg, device="cpu"), out).train()
    return replace(cfg, device="cpu")


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    _train(demo, dataset, out)
    return out


def _timm(tmp_path: Path, name: str = NAME, **options: int) -> tuple[nn.Module, Path]:
    """Random weights, none of them an initial value, and the file that holds them."""
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def _frozen(teacher: ImageEncoder) -> bool:
    """In an owner that trains, too."""
    nn.ModuleList([teacher]).train()
    learns = any(p.requires_grad for p in teacher.parameters())
    return not learns and not any(module.training for module in teacher.modules())


def _images(size: int = 64) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("recipe", [demo, demo_internimage])
def test_a_runs_encoder_is_that_of_its_newest_checkpoint(
    recipe: Callable[[], TrainConfig], dataset: Path, tmp_path: Path
) -> None:
    cfg = _train(recipe, dataset, tmp_path)
    teacher = load_teacher(str(tmp_path), cfg.vision)
    images = _images(cfg.vision.image_size)
    expected = load_objective(tmp_path, cfg).encoder
    with torch.no_grad():
        tokens = expected.encode_cells(images)
        assert _frozen(teacher) and teacher.dim == tokens.shape[-1]
        assert torch.equal(teacher.encode_cells(images), tokens)
        assert torch.equal(teacher.summarise(tokens), expected.summarise(tokens))
        average = load_objective(tmp_path, cfg).target_encoder.encoder.encode_cells(images)
        assert not torch.equal(average, tokens)
        of_average = load_teacher(f"{tmp_path},which=ema", cfg.vision)
        assert _frozen(of_average) and torch.equal(of_average.encode_cells(images), average)


def test_a_run_teaches_views_of_another_size_with_its_patches(run: Path) -> None:
    student = vit_demo(image_size=64, dim=64, depth=1)
    assert TrainConfig.load(run / "config.json").vision.image_size == 32
    tokens = load_teacher(str(run), student).encode_cells(_images())
    assert tokens.shape == (2, student.num_patches, 32)


def test_a_run_of_another_grid_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 4 x 4 tokens .* got 8 x 8; change vision"):
        load_teacher(str(run), STUDENT)
    student = ViTConfig(image_size=28, patch_size=7, dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"expected 4 x 4 tokens .* do not fill it"):
        load_teacher(str(run), student)


def test_a_run_that_is_not_there_or_not_whole_is_refused(run: Path, tmp_path: Path) -> None:
    vision = TrainConfig.load(run / "config.json").vision
    with pytest.raises(FileNotFoundError, match=r"teacher: no run in .*absent.*, timm:NAME "):
        load_teacher(str(tmp_path / "absent"), vision)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_teacher(str(tmp_path), vision)
    broken = tmp_path / "checkpoints" / "step_00000002"
    broken.mkdir(parents=True)
    with pytest.raises(ValueError, match="no good checkpoint .* the checkpoint is not whole"):
        load_teacher(str(tmp_path), vision)


def test_tokens_are_timms_without_the_prefix(tmp_path: Path) -> None:
    model, path = _timm(tmp_path, img_size=64)
    teacher = load_teacher(f"timm:{NAME}:{path}", STUDENT)
    images = _images()
    with torch.no_grad():
        tokens = teacher.encode_cells(images)
        assert torch.equal(tokens, model.forward_features(images)[:, 1:])  # type: ignore[operator]
    assert teacher.summarise(tokens) is tokens
    assert _frozen(teacher) and teacher.dim == tokens.shape[-1] == 192
    assert not any(".head." in name for name in teacher.state_dict())


def test_positions_of_another_size_are_interpolated_as_timm_does(tmp_path: Path) -> None:
    model, path = _timm(tmp_path, dynamic_img_size=True)
    images = _images()
    with torch.no_grad():
        tokens = load_teacher(f"timm:{NAME}:{path}", STUDENT).encode_cells(images)
        expected = model.forward_features(images)[:, 1:]  # type: ignore[operator]
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_timm_model_of_another_grid_is_refused(tmp_path: Path) -> None:
    _, path = _timm(tmp_path, img_size=64)
    student = replace(STUDENT, patch_size=8)
    with pytest.raises(ValueError, match=r"expected 8 x 8 tokens .* got 4 x 4; change vision"):
        load_teacher(f"timm:{NAME}:{path}", student)
    student = ViTConfig(image_size=72, patch_size=18, dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"expected 4 x 4 tokens .* do not fill it"):
        load_teacher(f"timm:{NAME}:{path}", student)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("test_vit", r"expected pixels of mean \(0.485, .* got a model for \(0.5, 0.5, 0.5\)"),
        ("resnet10t", r"square grid of patches, got \[1, 512, 2, 2\] of 0 x 0 .* take a ViT"),
    ],
)
def test_a_timm_model_that_cannot_teach_is_refused(name: str, error: str, tmp_path: Path) -> None:
    _, path = _timm(tmp_path, name)
    with pytest.raises(ValueError, match=error):
        load_teacher(f"timm:{name}:{path}", STUDENT)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _, path = _timm(tmp_path)
    state = load_file(path)
    del state["blocks.3.attn.qkv.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match="blocks.3.attn.qkv.weight"):
        load_teacher(f"timm:{NAME}:{path}", STUDENT)
    path.write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match="teacher timm:"):
        load_teacher(f"timm:{NAME}:{path}", STUDENT)
    with pytest.raises(FileNotFoundError, match="no such file: .*absent.safetensors"):
        load_teacher(f"timm:{NAME}:{tmp_path / 'absent.safetensors'}", STUDENT)
    with pytest.raises(ValueError, match=r"timm:vit_none: Unknown model \(vit_none\)"):
        load_teacher("timm:vit_none", STUDENT)


def test_without_a_network_a_file_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=rf"name a file: timm:{NAME}:FILE.safetensors"):
        load_teacher(f"timm:{NAME}", STUDENT)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"m3i-fast\[timm\]"):
        load_teacher(f"timm:{NAME}", STUDENT)
