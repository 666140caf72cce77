"""Each ablation is M3I with that one thing changed, and trains."""

import math
from pathlib import Path

import pytest

from m3i_fast.benchmarks.methods_ablation import VARIANTS
from m3i_fast.config import differences
from m3i_fast.engine.trainer import Trainer
from m3i_fast.models.text import TextConfig
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.recipes import demo, shrink

TEXT = TextConfig(vocab_size=814, context_length=24, dim=32, depth=1, num_heads=2, embed_dim=32)
TERMS = ["intra", "inter", "category", "caption"]


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        *((f"m3i - {left_out}", [t for t in TERMS if t != left_out]) for left_out in TERMS),
        ("category + caption", ["category", "caption"]),
    ],
)
def test_a_term_is_left_out(name: str, terms: list[str]) -> None:
    cfg = VARIANTS[name](demo())
    assert [term.name for term in cfg.objective.active_terms] == terms
    assert [line.split(":")[0] for line in differences(demo(), cfg)] == ["objective.terms"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m3i - mixing", ["mode: 'own_image' != 'none'"]),
        ("m3i: joint", ["mode: 'own_image' != 'joint'"]),
        ("m3i: 1 image", ["mode: 'own_image' != 'masked'"]),
        ("m3i: 3 images", ["data.batch_size: 32 != 33", "num_images: 2 != 3"]),
        ("m3i: gradient norm", ["mode: 'fixed' != 'gradient_norm'"]),
        ("m3i: uncertainty", ["mode: 'fixed' != 'uncertainty'"]),
    ],
)
def test_one_thing_is_changed(name: str, expected: list[str]) -> None:
    found = differences(demo(), VARIANTS[name](demo()))
    assert len(found) == len(expected)
    assert all(line.endswith(end) for line, end in zip(found, expected, strict=True))


def test_one_image_shows_as_many_cells_as_one_of_two() -> None:
    for cfg, images in ((demo(), 2), (VARIANTS["m3i: 1 image"](demo()), 1)):
        mixing = cfg.objective.mixing
        assert mixing.images_per_input == images
        assert {mixing.num_own(64, progress) for progress in (0.0, 0.5, 1.0)} == {32}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains(name: str, dataset: Path, tmp_path: Path) -> None:
    cfg = VARIANTS[name](shrink(demo(), path=dataset, num_classes=9, text=TEXT))
    Trainer(cfg, tmp_path / "run").train()
    [first, last] = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    losses = {f"loss/{term.name}" for term in cfg.objective.active_terms} | {"loss/total"}
    assert {key for key in last if key.startswith("loss/")} == losses
    assert all(math.isfinite(row[key]) for row in (first, last) for key in losses)
