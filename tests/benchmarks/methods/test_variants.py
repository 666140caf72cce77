"""Each ablation is M3I with that one thing changed, and trains."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.benchmarks.methods.variants import VARIANTS
from m3i_fast.config import differences
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.engine.trainer import Trainer
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
        ("m3i - mixing", ["mode: 'joint' != 'none'"]),
        ("m3i: 1 image", ["mode: 'joint' != 'masked'"]),
        ("m3i: each alone", ["mode: 'joint' != 'own_image'"]),
        ("m3i: blank cells", ["num_queries: 48 != 0", "min_contrast: 8 != 0"]),
        ("m3i: few asked", ["num_queries: 48 != 16", "dense_fraction: 1.0 != 0.25"]),
        ("m3i: 3 images", ["data.batch_size: 32 != 33", "num_images: 2 != 3"]),
        ("m3i: gradient norm", ["mode: 'fixed' != 'gradient_norm'"]),
        ("m3i: uncertainty", ["mode: 'fixed' != 'uncertainty'"]),
    ],
)
def test_one_thing_is_changed(name: str, expected: list[str]) -> None:
    found = differences(demo(), VARIANTS[name](demo()))
    assert len(found) == len(expected)
    assert all(line.endswith(end) for line, end in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "of", "changes"),
    [
        ("m3i: mean over members", "label", {"mean": "members"}),
        ("m3i: raw targets", "dense", {"standardise": "none", "regulariser": "decorrelation"}),
        ("m3i: targets by batch", "dense", {"standardise": "batch"}),
        ("m3i: second moment", "dense", {"regulariser": "decorrelation"}),
        ("m3i: dense 0.3", "dense", {"weight": 0.3}),
        ("m3i: dense 1", "dense", {"weight": 1.0}),
        ("m3i: dense 10", "dense", {"weight": 10.0}),
        ("m3i: projector", "dense", {}),
        ("m3i: batch norm projector", "dense", {"standardise": "none"}),
    ],
)
def test_terms_of_one_kind_are_changed(name: str, of: str, changes: dict[str, Any]) -> None:
    cfg = VARIANTS[name](demo())
    for before, after in zip(demo().objective.terms, cfg.objective.terms, strict=True):
        expected = replace(before, **changes) if before.is_dense == (of == "dense") else before
        assert after == expected
    others = [line for line in differences(demo(), cfg) if "objective.terms" not in line]
    projector = {"m3i: projector": ["mlp"], "m3i: batch norm projector": ["batch_norm"]}
    assert [line.rpartition("!= ")[2].strip("'") for line in others] == projector.get(name, [])


def test_m3i_as_before_is_what_its_rows_were_of() -> None:
    """Each image alone, a quarter of the inputs asked of 16 cells."""
    objective = VARIANTS["m3i as before"](demo()).objective
    mixing = MixingConfig(
        mode="own_image", mask_block=2, num_queries=16, dense_fraction=0.25, token_dropout=0.2
    )
    assert objective.mixing == mixing
    for term in objective.terms:
        assert (term.standardise, term.mean) == (
            ("none", "batch") if term.is_dense else ("none", "members")
        )
        assert (term.weight, term.decorrelates) == ((0.3, True) if term.is_dense else (1.0, False))
        assert term.regulariser != "covariance"


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
