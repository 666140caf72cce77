"""Regions of pictures: what a column stores, and what views show of it by both backends.

The oracle of views is torchvision.transforms.v2 on its own boxes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from m3i_fast.config.columns import REGION_UNIT, REGION_WIDTH
from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo
from m3i_fast.pipelines.dataset.annotations.regions import (
    Regions,
    RegionViews,
    region_rows,
    region_values,
)
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    EVERYTHING,
    encode_image,
    equal,
    info,
    sample,
    smooth_picture,
    take,
)

Box = tuple[float, float, float, float]  # top, left, bottom, right in shares
SIZES = (24, 36), (40, 28), (32, 32)
NUM, MOST = 18, 7
OBJECTS = ColumnInfo(name="objects", kind="regions", size=MOST)


def regions_of(index: int) -> list[tuple[Box, list[int]]] | None:
    """The regions of a sample; not known of every sixth, none in every fifth."""
    if index % 6 == 0:
        return None
    rng = np.random.default_rng(index)
    found = []
    for k in range(index % 5 and 2 + index % 6):
        top, left = rng.uniform(0, 0.7, 2)
        height, width = rng.uniform(0.05, 0.3, 2)
        found.append(((top, left, top + height, left + width), [1, index + 2, *range(k + 3, 10)]))
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = [encode_image(smooth_picture(i, *size)) for i, size in enumerate(SIZES)]
    samples = [sample(i, pictures[i % 3], columns={"objects": regions_of(i)}) for i in range(NUM)]
    out = tmp_path_factory.mktemp("regions") / "data"
    about = info(columns=(OBJECTS,))
    return write_dataset(out, {"train": samples}, about, seed=0, samples_per_shard=5)


@pytest.fixture
def cfg(path: Path) -> LoaderConfig:
    local = replace(EVERYTHING, count=3, size=8, scale=(0.05, 0.3), ratio=(0.4, 2.5))
    return LoaderConfig(
        path=path,
        batch_size=6,
        global_views=replace(EVERYTHING, scale=(0.2, 0.9)),
        local_views=local,
        max_regions=3,
        min_region_share=0.3,
    )


def by_torchvision(
    regions: list[tuple[Box, list[int]]],
    size: tuple[int, int],
    view: list[float],
    side: int,
    share: float,
) -> list[tuple[Tensor, list[int]]]:
    """What torchvision makes of boxes by the view's crop, resize and mirror: box in the view."""
    height, width = size
    if not regions:
        return []
    pixels = torch.tensor([box for box, _ in regions], dtype=torch.float64)
    pixels = pixels * torch.tensor([height, width, height, width])
    boxes: Any = tv_tensors.BoundingBoxes(pixels[:, [1, 0, 3, 2]], format="XYXY", canvas_size=size)
    top, left, rows, columns = map(int, view[:4])
    cut = v2.crop(boxes, top, left, rows, columns)
    cut = v2.clamp_bounding_boxes(cut)
    area = (cut[:, 2:] - cut[:, :2]).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    cut = v2.clamp_bounding_boxes(v2.resize(cut, [side, side]))  # rounding may leave the view
    if view[4]:
        cut = v2.horizontal_flip(cut)
    _, good = v2.sanitize_bounding_boxes(cut, min_size=1e-9, min_area=1e-9)
    good &= area >= share
    return [
        (torch.as_tensor(cut[i])[[1, 0, 3, 2]] / side, regions[i][1])
        for i in range(len(regions))
        if good[i]
    ]


def expect_regions(batch: Batch, cfg: LoaderConfig) -> int:
    """Each view's regions are torchvision's; returns how many of them were compared."""
    found = Regions.of(batch.columns["objects"])
    views = [*batch.global_views, *batch.local_views]
    compared = 0
    for row, number in enumerate(batch.sample_id.tolist()):
        for v, view in enumerate(views):
            expected = by_torchvision(
                regions_of(number) or [],
                SIZES[number % 3],
                batch.boxes[row, v].tolist(),
                view.shape[-1],
                cfg.min_region_share,
            )
            kept = int(found.mask[row, v].sum())
            assert found.mask[row, v].tolist() == [True] * kept + [False] * (cfg.max_regions - kept)
            assert kept == min(len(expected), cfg.max_regions)
            ids = [[i for i in each if i >= 0] for each in found.token_ids[row, v, :kept].tolist()]
            places = [next(j for j, (_, t) in enumerate(expected) if t == each) for each in ids]
            assert places == sorted(set(places))  # in the column's order
            for box, place in zip(found.boxes[row, v, :kept], places, strict=True):
                torch.testing.assert_close(box.double(), expected[place][0], rtol=0, atol=1e-6)
            compared += kept
    return compared


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_views_have_the_regions_that_torchvision_gives(cfg: LoaderConfig, backend: str) -> None:
    loader = Loader(replace(cfg, backend=backend))  # type: ignore[arg-type]
    batches = take(loader, 6)
    assert all(b.columns["objects"].shape == (6, 5, 3, REGION_WIDTH) for b in batches)
    flips = torch.cat([b.boxes[..., 4] for b in batches])
    assert 0 < flips.mean() < 1
    assert sum(expect_regions(batch, cfg) for batch in batches) > 60
    loader.close()


def test_both_backends_give_the_same_bits(cfg: LoaderConfig) -> None:
    dali, ours = (Loader(replace(cfg, backend=name)) for name in ("dali", "torch"))  # type: ignore[arg-type]
    assert all(equal(a, b) for a, b in zip(take(dali, 5), take(ours, 5), strict=True))
    dali.close()
    ours.close()


def test_ranks_and_a_resumed_run_have_the_same_regions(cfg: LoaderConfig) -> None:
    one = Loader(replace(cfg, batch_size=12))
    whole = take(one, 3)
    state = one.state_dict()
    after = next(one)
    resumed = Loader(replace(cfg, batch_size=12, num_threads=3))
    resumed.load_state_dict(state)
    assert equal(next(resumed), after)
    of_all = {
        p: row
        for b in whole
        for p, row in zip(b.position.tolist(), b.columns["objects"], strict=True)
    }
    ranks = [Loader(cfg, rank=rank, num_ranks=2) for rank in range(2)]
    for batch in (next(rank) for _ in range(3) for rank in ranks):
        for position, row in zip(batch.position.tolist(), batch.columns["objects"], strict=True):
            assert torch.equal(row, of_all.pop(position))
    assert not of_all


def test_which_regions_a_full_view_has_is_drawn_anew_at_every_position() -> None:
    """All of them equally often, and never one twice."""
    box = [0, 0, REGION_UNIT, REGION_UNIT]
    values = np.full((400, 6, REGION_WIDTH), -1, np.int32)
    values[:, :5, :4] = box
    values[:, :5, 4] = np.arange(5)
    params = np.tile(np.array([0, 0, 8, 8, 0], np.float32), (400, 2, 1))
    shown = RegionViews(most=2, least_share=0.5, seed=3)
    sizes, positions = np.full((400, 2), 8), np.arange(400)
    found = shown.of(values, params, sizes, positions)
    ids = found[..., 4]
    assert (ids[..., 0] < ids[..., 1]).all()
    counts = np.bincount(ids.reshape(-1), minlength=5)
    assert counts.sum() == 1600 and abs(counts - 320).max() < 60
    assert (ids[:, 0] != ids[:, 1]).any(1).mean() > 0.5  # views draw by themselves
    some = shown.of(values[7:9], params[7:9], sizes[7:9], positions[7:9])
    assert (some == found[7:9]).all()
    other = replace(shown, seed=4).of(values, params, sizes, positions)
    assert (other[..., 4] != ids).any()


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_a_region_of_which_little_is_shown_is_left_out(share: float) -> None:
    """A box of 10 x 10 pixels, of which the view shows 2, 5 and 10 columns."""
    values = region_rows([((0, 0.1, 0.1, 0.2), [5])], 1)[None]
    shown = RegionViews(most=1, least_share=share, seed=0)
    for left, part in ((18, 0.2), (15, 0.5), (10, 1.0), (0, 1.0), (20, 0.0), (19.9, 0.01)):
        params = np.array([[[0, left, 50, 50, 0]]], np.float32)
        found = shown.of(values, params, np.array([[100, 100]]), np.array([0]))
        assert (found[0, 0, 0, 4] == 5) == (part >= share), left


def test_views_of_any_shape_carry_them(cfg: LoaderConfig) -> None:
    """The same regions at a position as views that are squares, whose boxes are the same."""
    loader = PackedLoader(
        cfg, token_budget=300, patch_size=4, global_sides=(2, 6), local_sides=(1, 3)
    )
    squares = next(Loader(replace(cfg, batch_size=12)))
    expected = dict(zip(squares.position.tolist(), squares.columns["objects"], strict=True))
    compared = 0
    for batch in (next(loader) for _ in range(3)):
        moved = batch.to("cpu").columns["objects"]
        for position, row in zip(batch.position.tolist(), moved, strict=True):
            if position in expected:
                assert torch.equal(row, expected[position])
                compared += int((row[..., 4] >= 0).sum())
    assert compared > 10


def test_evaluation_has_the_regions_of_the_centre_square(path: Path) -> None:
    (batch,) = evaluation_batches(path, "train", image_size=16, batch_size=NUM)
    found = Regions.of(batch.columns["objects"])
    assert found.boxes.shape == (NUM, 1, LoaderConfig().max_regions, 4)
    assert expect_regions(batch, LoaderConfig(min_region_share=0.5, max_regions=4)) > 10


def test_a_view_of_another_picture_has_none(cfg: LoaderConfig, tmp_path: Path) -> None:
    """Its boxes are of the first one; without alternates the view is of that, too."""
    pictures = [encode_image(smooth_picture(i, 24, 36)) for i in range(2)]
    whole = [((0.0, 0.0, 1.0, 1.0), [1, 2])]
    samples = [
        sample(i, pictures[0], alternates=(pictures[1],), columns={"objects": whole})
        for i in range(6)
    ]
    about = info(columns=(OBJECTS,))
    out = write_dataset(tmp_path / "d", {"train": samples}, about, seed=0, samples_per_shard=6)
    cfg = replace(cfg, path=out, min_region_share=0.01)
    for backend in ("dali", "torch"):
        for alternates in (True, False):
            loader = Loader(replace(cfg, backend=backend, alternates=alternates))  # type: ignore[arg-type]
            mask = Regions.of(next(loader).columns["objects"]).mask.any(2)
            assert mask[:, [0, 2, 3, 4]].all()
            assert (mask[:, 1] == (not alternates)).all()
            loader.close()


def test_a_mixture_has_no_regions_where_a_data_set_has_none(
    path: Path, cfg: LoaderConfig, tmp_path: Path
) -> None:
    picture = encode_image(smooth_picture(0, 20, 28))
    larger = replace(OBJECTS, size=9)
    samples = [sample(i, picture, columns={"objects": regions_of(i + 1)}) for i in range(6)]
    parts = {
        "plain": ([sample(i, picture) for i in range(6)], ()),
        "more": (samples, (larger,)),
    }
    for name, (of, columns) in parts.items():
        write_dataset(
            tmp_path / name, {"train": of}, info(columns=columns), seed=0, samples_per_shard=4
        )
    mixture = (f"{path}:train:1", *(f"{tmp_path / name}:train:1" for name in parts))
    batches = take(Loader(replace(cfg, mixture=mixture)), 8)
    for batch in batches:
        datasets = batch.sample_id // 2**48
        objects = batch.columns["objects"]
        assert (objects[datasets == 1] == -1).all()
        assert objects.shape[1:] == (5, 3, REGION_WIDTH)
        for row in (datasets == 0).nonzero()[:, 0].tolist():
            known = regions_of(int(batch.sample_id[row]))
            assert known or (objects[row] == -1).all()
    assert any((b.columns["objects"][b.sample_id // 2**48 == 2] >= 0).any() for b in batches)


def test_the_file_is_as_the_format_says(path: Path) -> None:
    """Read by numpy alone, as docs/reference/dataset_format.md has it."""
    manifest = read_manifest(path)
    assert manifest.format_version == 6
    rows = np.fromfile(path / "train.columns", "<i4").reshape(NUM, MOST, 36)
    table = np.fromfile(path / "train.samples", np.dtype("<i8, <i8, V32"))
    for number, row in zip(table["f1"].tolist(), rows, strict=True):
        expected = regions_of(number)
        if expected is None:
            assert (row == -2).all()
            continue
        found = region_values(row)
        assert [ids for _, ids in found] == [ids for _, ids in expected]
        assert (row[len(expected) :] == -1).all()
        for (box, _), (given, _) in zip(found, expected, strict=True):
            assert np.allclose(box, given, rtol=0, atol=2**-31 * 1.01)
    known = manifest.splits["train"].columns
    assert known is not None
    assert known.num_known == {"objects": sum(regions_of(i) is not None for i in range(NUM))}


@pytest.mark.parametrize(
    ("region", "told"),
    [
        (((0, 0, 0.5, 1.1), [1]), r"expected a box of shares in \[0, 1\]"),
        (((0, 0.5, 0.5, 0.5), [1]), "expected top < bottom and left < right"),
        (((0.5, 0, 0.4, 1), [1]), "expected top < bottom and left < right"),
        (((0, 0, float("nan"), 1), [1]), r"expected a box of shares in \[0, 1\]"),
        (((0, 0, 1), [1]), "expected a box of 4 numbers and 1 to 32 token ids, got 3 and 1"),
        (((0, 0, 1, 1), []), "expected a box of 4 .*, got 4 and 0"),
        (((0, 0, 1, 1), [1, 521]), "expected token ids below 521, got 521"),
    ],
)
def test_what_is_no_region_is_refused_by_name(tmp_path: Path, region: Any, told: str) -> None:
    picture = encode_image(smooth_picture(0, 20, 28))
    samples = [sample(0, picture, columns={"objects": [region]})]
    about = info(columns=(OBJECTS,))
    with pytest.raises(ValueError, match=f"sample picture-0: objects: {told}"):
        write_dataset(tmp_path / "data", {"train": samples}, about, seed=0, samples_per_shard=4)


@pytest.mark.parametrize(
    ("place", "value"), [((0, 0), -5), ((0, 2), REGION_UNIT + 1), ((0, 4), 521), ((1, 4), -1)]
)
def test_damaged_rows_are_found(
    path: Path, tmp_path: Path, place: tuple[int, int], value: int
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    rows = np.fromfile(copy / "train.columns", "<i4").reshape(NUM, MOST, 36)
    number = int(np.argmax(rows[:, 2, 4] >= 0))
    rows[number][place] = value
    if place == (1, 4):  # a box without a text, followed by others
        rows[number, 1] = -1
    (copy / "train.columns").write_bytes(rows.tobytes())
    told = f"row {number}: objects: expected boxes .* as region {place[0]}"
    with pytest.raises(ValueError, match=told):
        verify(copy)


def test_version_five_has_no_regions(path: Path, tmp_path: Path) -> None:
    raw = (path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(
        raw.replace('"format_version": 6', '"format_version": 5')
    )
    with pytest.raises(ValueError, match="expected regions from format version 6 on alone, got 5"):
        read_manifest(tmp_path)


def test_a_share_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"min_region_share: expected a share in \(0, 1\], got 0"):
        LoaderConfig(min_region_share=0)
    assert ViewConfig().flip_probability == 0.5  # mirrors boxes, and no words
