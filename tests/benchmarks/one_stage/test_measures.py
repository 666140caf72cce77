"""Counts by cluster and the figures of their sums, beside scikit-learn and numpy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from m3i_fast.benchmarks.one_stage import measures
from m3i_fast.benchmarks.one_stage.arms import OURS, Stage, stage_config
from m3i_fast.benchmarks.one_stage.measures import (
    COMMON,
    across_styles,
    by_item,
    counts_by_cluster,
    figure,
    measure_patches,
    patch_cover,
    read_tiles,
)
from m3i_fast.evaluation.dense.patch_probe import overlaps
from m3i_fast.pipelines.sources import earth, styles
from m3i_fast.pipelines.sources.earth_maps import COVERS
from m3i_fast.recipes import DEMO_MERGES


def test_hits_are_summed_by_cluster() -> None:
    hits = torch.tensor([1.0, 0.5, math.nan, 0.0, 1.0, math.nan], dtype=torch.float64)
    cluster = torch.tensor([7, 3, 3, 7, 9, 11])
    found = by_item(hits, cluster)
    assert json.loads(json.dumps(found)) == found
    ids, counts = counts_by_cluster(found)
    assert ids.tolist() == [3, 7, 9] and counts.tolist() == [[0.5, 1], [1, 2], [1, 1]]
    assert figure(counts) == pytest.approx(2.5 / 4)
    assert figure(np.stack([counts] * 2)).shape == (2,)


def test_mean_iou_is_that_of_scikit_learn_over_common_classes() -> None:
    rng = torch.Generator().manual_seed(0)
    label = torch.randint(len(COVERS) - 1, (900,), generator=rng)  # never the last: no land is bare
    predicted = torch.where(
        torch.rand(900, generator=rng) < 0.6,
        label,
        torch.randint(len(COVERS) - 1, (900,), generator=rng),
    )
    counts = overlaps(label, predicted, torch.arange(900) // 90, len(COVERS))
    seen = [each for each in COMMON if each != len(COVERS) - 1]
    expected = jaccard_score(label, predicted, labels=seen, average=None)
    assert figure(counts) == pytest.approx(expected.mean(), abs=1e-12)
    assert figure(counts[:3]) != figure(counts)


def test_a_patch_has_the_class_of_most_of_its_pixels() -> None:
    covers = torch.from_numpy(
        np.random.default_rng(0).integers(4, size=(3, 12, 12)).astype(np.uint8)
    )
    found = patch_cover(covers, 3)
    assert found.shape == (3, 9)
    for tile in range(3):
        for patch in range(9):
            y, x = 4 * (patch // 3), 4 * (patch % 3)
            pixels = covers[tile, y : y + 4, x : x + 4].numpy().ravel()
            assert found[tile, patch] == np.bincount(pixels).argmax()


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """Tiles in bands of land cover, whose colour tells it but for noise."""
    rng = np.random.default_rng(0)
    colours = rng.integers(256, size=(len(COVERS), 3))
    for part, corners in (
        ("training", [(r, c) for r in range(0, 1024, 64) for c in range(0, 1024, 32)]),
        ("validation", [(1400 + 64 * r, 230 + 225 * c) for r in range(2) for c in range(9)]),
    ):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
        for row, column in corners:
            cover = rng.choice(COMMON, size=8).repeat(8)[:, None].repeat(64, 1)
            pixels = (colours[cover] + rng.integers(-9, 10, (64, 64, 3))).clip(0, 255)
            name = f"{row}-{column}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / part / name)
            annotation = Image.fromarray((cover + 1).astype(np.uint8))
            annotation.save(tmp_path / "annotations" / part / name)
    return tmp_path


def test_patches_are_probed_on_tiles_that_do_not_overlap(masks: Path) -> None:
    cfg = stage_config(Stage(OURS), num_classes=len(COVERS))
    views, covers, block = read_tiles(masks, "training", 64)
    assert views.shape == (16 * 16, 3, 64, 64) and covers.shape == (16 * 16, 64, 64)
    assert len(block.unique()) == 25
    colours = measures.partial(_mean_colour, grid=cfg.vision.grid)
    found = measure_patches(colours, cfg, masks, "validation")
    assert set(found) == {"patch_miou", "patch_top1"}
    tiles, patches = (counts_by_cluster(found[name]) for name in ("patch_top1", "patch_miou"))
    assert figure(tiles[1]) > 0.95
    right, labelled, _ = patches[1].sum((0, 2))
    assert figure(tiles[1]) == pytest.approx(right / labelled, abs=1e-3)
    assert figure(patches[1]) > 0.9
    assert tiles[1][:, 1].sum() == 18 and labelled == 18 * 64
    blocks = {24 * ((1400 + 32 + 64 * r) // 225) + (262 + 225 * c) // 225
              for r in range(2) for c in range(9)}  # fmt: skip
    assert patches[0].tolist() == tiles[0].tolist() == sorted(blocks)
    blind = measure_patches(lambda views: torch.ones(len(views), 64, 2), cfg, masks, "validation")
    assert figure(counts_by_cluster(blind["patch_top1"])[1]) < 0.2
    with pytest.raises(FileNotFoundError):
        measure_patches(colours, cfg, masks, "tune")


def _mean_colour(views: torch.Tensor, grid: int) -> torch.Tensor:
    side = views.shape[-1] // grid
    colours = torch.nn.functional.avg_pool2d(views.float() / 255, side)
    return colours.flatten(2).mT


def test_a_block_of_a_measured_tile_is_the_one_it_was_cut_from(tmp_path: Path) -> None:
    (tmp_path / "images/validation").mkdir(parents=True)
    (tmp_path / "annotations/validation").mkdir(parents=True)
    expected = []
    for where in earth.measured_tiles(measures.EARTH_HEIGHT, 64, {(0, 0), (3, 23), (11, 7)}):
        name = f"validation/{where.row}-{where.column}.png"
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / name)
        Image.new("L", (64, 64), 1).save(tmp_path / "annotations" / name)
        expected.append((name, where.block[0] * 24 + where.block[1]))
    _, _, block = read_tiles(tmp_path, "validation", 64)
    assert block.tolist() == [number for _, number in sorted(expected)]


def test_a_drawing_is_found_in_another_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = styles.build(tmp_path / "styles", limit=60, image_size=24, num_merges=DEMO_MERGES)
    cfg = replace(stage_config(Stage(OURS)), data=replace(stage_config(Stage(OURS)).data, path=out))
    said: list[Any] = []
    collect = measures.collect_features

    def of_caption(pictures: Any, *_: Any) -> Any:
        batches = list(pictures)
        embed = SimpleNamespace(
            images=lambda views: (torch.zeros(len(views), 1, 2), torch.zeros(len(views), 1)),
            captions=lambda ids, _: torch.zeros(len(ids), 1),
        )
        found = collect(batches, embed.images, embed.captions, torch.device("cpu"))
        ids = torch.cat([batch.token_ids for batch in batches])
        words = torch.nn.functional.one_hot(ids.long(), 2000).sum(1).float()
        said.append(ids)
        return replace(found, encoder=words.roll(shift, 0))

    monkeypatch.setattr(measures, "collect_features", of_caption)
    model = SimpleNamespace(embed_images=None, embed_captions=None)
    shift = 0
    clusters = {int(i): int(i) for i in range(100_000)}
    found = across_styles(model, cfg, out, clusters)["across_styles_top1"]
    counts = counts_by_cluster(found)[1]
    assert figure(counts) == 1  # each concept's caption is its own, in both styles
    assert counts[:, 1].sum() == 12
    assert sorted(said[0].tolist()) == sorted(said[1].tolist())
    shift = 1
    found = across_styles(model, cfg, out, clusters)["across_styles_top1"]
    assert figure(counts_by_cluster(found)[1]) < 0.5
