"""Every recipe builds at full size, and its shrunken twin takes two real steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config import TrainConfig, differences
from m3i_fast.config.data import ViewConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.recipes import RECIPES, demo, recipes, shrink
from tests.shared.groups import at_gate
from tests.shared.pipelines.with_regions import with_regions

# One a family of encoders and kind of objective.
GATE = ("m3i_vit_b", "m3i_internimage_t", "dinov3_vit_s", "siglip2_vit_s", "demo_radio")
TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)


TAUGHT = [name for name, make in recipes().items() if make().objective.uses(encoder="frozen")]


def _shrunken(name: str, dataset: Path) -> TrainConfig:
    return replace(shrink(recipes()[name](), path=dataset, num_classes=9, text=TEXT), device="cpu")


@pytest.fixture(scope="module")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "teacher"
    Trainer(_shrunken("demo_supervised", dataset), out).train()
    return out


@pytest.mark.parametrize("name", [name for name in recipes() if name not in TAUGHT])
def test_a_recipe_builds_on_the_meta_device_and_survives_json(name: str, tmp_path: Path) -> None:
    cfg = recipes()[name]()
    with torch.device("meta"):
        objective = build_objective(cfg)
    assert all(p.is_meta for p in objective.parameters())
    cfg.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == cfg


@pytest.mark.parametrize("name", at_gate(GATE, recipes()))
def test_a_shrunken_recipe_takes_two_steps(
    name: str, dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    cfg = _shrunken(name, dataset)
    if name in TAUGHT:
        with pytest.raises(ValueError, match=r"objective\.teacher.*got none"):
            Trainer(cfg, tmp_path)
        cfg = replace(cfg, objective=replace(cfg.objective, teacher=str(teacher)))
    if cfg.columns:
        cfg = _on_regions(cfg, dataset, tmp_path / "data")
    assert Trainer(cfg, tmp_path / "run").train().step == 2


def _on_regions(cfg: TrainConfig, dataset: Path, out: Path) -> TrainConfig:
    """Data that have none are refused, by the column's name."""
    with pytest.raises(ValueError, match="expected a column 'regions' of regions, got no columns"):
        take_data_fields(cfg)
    data = replace(cfg.data, path=with_regions(dataset, out))
    return take_data_fields(replace(cfg, data=data))


def test_a_way_to_recompute_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    cfg, path = RECIPES["m3i_vit_h"](), tmp_path / "config.json"
    for wrong in (True, "half"):
        fields = json.loads(cfg.to_json())
        fields["vision"]["activation_checkpointing"] = wrong
        path.write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=r"config\.json.*not in literal"):
            TrainConfig.load(path)


def test_sizes_are_those_of_timm() -> None:
    import timm

    for name, model in (
        ("m3i_vit_s", "vit_small_patch16_224"),
        ("m3i_vit_h", "vit_huge_patch14_224"),
    ):
        cfg = RECIPES[name]()
        with torch.device("meta"):
            ours = sum(p.numel() for p in build_objective(cfg).encoder.parameters())
            theirs = timm.create_model(
                model, num_classes=0, class_token=False, global_pool="avg", fc_norm=False
            )
        assert ours == sum(p.numel() for p in theirs.parameters())


def test_a_config_that_does_not_fit_together_is_named(tmp_path: Path) -> None:
    cfg = demo()
    with pytest.raises(ValueError, match=r"data\.global_views\.size.*64.*got 32"):
        replace(cfg, data=replace(cfg.data, global_views=replace(cfg.data.global_views, size=32)))
    with pytest.raises(ValueError, match=r"data\.global_views\.count"):
        replace(cfg, data=replace(cfg.data, global_views=replace(cfg.data.global_views, count=1)))
    with pytest.raises(ValueError, match=r"data\.local_views\.size.*8, got 30"):
        replace(cfg, data=replace(cfg.data, local_views=ViewConfig(size=30)))
    with pytest.raises(ValueError, match=r"data\.batch_size: .* multiple of 2, .* got 33"):
        replace(cfg, data=replace(cfg.data, batch_size=33))
    with pytest.raises(ValueError, match=r"data\.local_views: expected none .* blend"):
        labels = tuple(term for term in cfg.objective.terms if not term.is_dense)
        blended = replace(cfg.objective, terms=labels, mixing=MixingConfig(mode="blend"))
        replace(cfg, objective=blended)
    with pytest.raises(ValueError, match="num_steps"):
        replace(cfg, num_steps=0)
    assert differences(cfg, replace(cfg, seed=5)) == ["seed: 0 != 5"]
    path = tmp_path / "config.json"
    path.write_text(cfg.to_json().replace('"num_steps"', '"num_stebs"'))
    with pytest.raises(ValueError, match=r"config\.json.*num_stebs"):
        TrainConfig.load(path)
    with pytest.raises(FileNotFoundError, match="--config"):
        TrainConfig.load(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["vit_ti", "vit_s"])
def test_text_encoder_and_decoder_are_in_proportion_to_a_small_encoder(name: str) -> None:
    """Without embeddings CLIP's text encoder has 0.44 of the parameters of its ViT-B/16."""
    cfg = RECIPES[name]()
    with torch.device("meta"):
        objective = build_objective(cfg)
    encoder, text, decoder = (
        sum(p.numel() for key, p in objective.named_parameters() if key.startswith(prefix))
        for prefix in ("encoder.blocks.", "terms.caption.text_encoder.blocks.", "decoders.")
    )
    assert text / encoder == pytest.approx(0.5, abs=0.01)
    assert 0 < decoder < encoder
    assert cfg.text.dim == 64 * cfg.text.num_heads == cfg.vision.dim
