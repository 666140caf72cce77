"""Leaks that are planted are found: captions, pictures nearly alike, tiles that touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_cdt

from m3i_fast.benchmarks.one_stage.leaks import (
    captions,
    least_gap,
    names_a_cover,
    separation_of_earth,
    separation_of_styles,
)
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.sources.styles import OTHER_STYLES, SEEN_STYLE
from tests.shared.pipelines.data import encode_image, info, sample, smooth_picture

Told = tuple[str, NDArray[np.uint8]]  # caption and picture
TRAINING = [(f"cat {n}", smooth_picture(n, 72, 72)) for n in range(4)]
MEASURED = [(f"dog {n}", smooth_picture(10 + n, 72, 72)) for n in range(4)]


def write(out: Path, splits: Mapping[str, Sequence[Told]]) -> Path:
    """A data set whose pictures have these captions."""
    tokenizer, number, samples = Tokenizer(200, 24), 0, {}
    for split, those in splits.items():
        samples[split] = [
            sample(number + i, encode_image(picture), captions=(tokenizer.encode(caption),))
            for i, (caption, picture) in enumerate(those)
        ]
        number += len(those)
    return write_dataset(
        out, samples, info(tokenizer=tokenizer.info), seed=0, samples_per_shard=100
    )


def slightly_changed(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    changed = picture.astype(int)
    changed[:30, :30] += 8
    return changed.clip(0, 255).astype(np.uint8)


# ---- Styles --------------------------------------------------------------------------------------


def test_what_does_not_leak_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "data", {"train": TRAINING, SEEN_STYLE: MEASURED})
    [found] = separation_of_styles(path)
    assert found.name == f"data, {SEEN_STYLE}" and found.num_captions == 4
    thumbnails = [
        np.stack([p.reshape(12, 6, 12, 6, 3).mean((1, 3)) / 255 for _, p in those])
        for those in (MEASURED, TRAINING)
    ]
    rms = ((thumbnails[0][:, None] - thumbnails[1]) ** 2).mean((2, 3, 4)) ** 0.5
    assert found.nearest == pytest.approx(rms.min(), abs=1e-3)  # views are rounded to 8 bits


@pytest.mark.parametrize("split", [SEEN_STYLE, OTHER_STYLES, "tune"])
def test_a_caption_of_training_is_found(tmp_path: Path, split: str) -> None:
    asked = [*MEASURED[:3], ("cat 2", MEASURED[3][1])]
    path = write(tmp_path / "data", {"train": TRAINING, split: asked})
    with pytest.raises(ValueError, match=rf"captions of {split} that no .* 1 of both.* cat 2"):
        list(separation_of_styles(path))


@pytest.mark.parametrize("split", [SEEN_STYLE, "tune"])
def test_a_picture_nearly_of_training_is_found(tmp_path: Path, split: str) -> None:
    near = ("dog 3", slightly_changed(TRAINING[1][1]))
    path = write(tmp_path / "data", {"train": TRAINING, split: [*MEASURED[:3], near]})
    with pytest.raises(ValueError, match=rf"pictures of {split} at least rms 0.05 .*concept 7"):
        list(separation_of_styles(path))


def test_only_the_hard_half_of_other_styles_is_measured(tmp_path: Path) -> None:
    """Flags look alike in every style; the half that lies nearest to training does not count."""
    near = [(f"dog {n}", slightly_changed(TRAINING[n][1])) for n in range(3)]
    path = write(tmp_path / "data", {"train": TRAINING, OTHER_STYLES: [near[0], *MEASURED[:3]]})
    assert [each.nearest > 0.05 for each in separation_of_styles(path)] == [True]
    path = write(tmp_path / "more", {"train": TRAINING, OTHER_STYLES: [*near, MEASURED[3]]})
    with pytest.raises(ValueError, match=f"pictures of {OTHER_STYLES}"):
        list(separation_of_styles(path))


# ---- Earth ---------------------------------------------------------------------------------------


def corners(masks: Path, part: str, those: Sequence[tuple[int, int]]) -> None:
    folder = masks / "images" / part
    folder.mkdir(parents=True)
    for row, column in those:
        (folder / f"{row}-{column}.png").touch()


@pytest.fixture
def earth(tmp_path: Path) -> Path:
    held_out = [("coast of Peru, arid climate", MEASURED[0][1])]
    return write(tmp_path / "earth", {"train": TRAINING, "heldout": held_out, "tune": MEASURED})


def test_the_gap_is_told_in_tiles(earth: Path, tmp_path: Path) -> None:
    corners(tmp_path / "masks", "training", [(0, 0), (64, 0)])
    corners(tmp_path / "masks", "validation", [(16, 5400 - 160)])  # 96 pixels, round the Earth
    corners(tmp_path / "masks", "tune", [(256, 0), (1024, 0)])
    found = [*separation_of_earth(earth, tmp_path / "masks")]
    told = [(each.name, each.num_captions, each.nearest) for each in found]
    assert told == [("earth, heldout", 1, 1.5), ("earth, tune", 4, 2.0)]


@pytest.mark.parametrize("part", ["validation", "tune"])
def test_a_tile_that_touches_is_found(earth: Path, tmp_path: Path, part: str) -> None:
    corners(tmp_path / "masks", "training", [(0, 0)])
    for each in ("validation", "tune"):
        corners(tmp_path / "masks", each, [(512, 512), *([(127, 0)] if each == part else [])])
    with pytest.raises(ValueError, match=f"tiles of {part} at least 64 pixels .* got 63"):
        list(separation_of_earth(earth, tmp_path / "masks"))


def test_a_caption_that_names_the_land_cover_is_found(tmp_path: Path) -> None:
    told = [("Brazil, evergreen broadleaf forest", MEASURED[0][1])]
    path = write(tmp_path / "earth", {"train": told, "heldout": MEASURED})
    with pytest.raises(ValueError, match="captions of train that name no land cover, got brazil"):
        list(separation_of_earth(path, tmp_path))
    assert names_a_cover("Snow and ice, cold") and not names_a_cover("icewater bay, waters")


def test_gaps_equal_those_of_scipy_on_pixels() -> None:
    rng, height, tile = np.random.default_rng(0), 60, 5
    for _ in range(50):
        those = rng.integers([height - tile + 1, 2 * height], size=(4, 2))
        asked, training = those[:1], those[1:]
        near, far = (np.zeros((height, 2 * height), bool) for _ in range(2))
        for drawn, each in ((near, asked), (far, training)):
            for row, column in each:
                drawn[row : row + tile, (column + np.arange(tile)) % (2 * height)] = True
        thrice = [np.concatenate([one, one, one], 1) for one in (near, far)]
        steps = int(distance_transform_cdt(~thrice[0], "chessboard")[thrice[1]].min())
        assert least_gap(asked, training, tile, height) == max(steps - 1, 0)


def test_captions_are_read_back(tmp_path: Path) -> None:
    path = write(tmp_path / "data", {"train": TRAINING})
    assert captions(path, "train") == {f"cat {n}" for n in range(4)}
