"""Scenes: a pixel count in numpy, Pillow's resize, and how often each drawing is used."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from m3i_fast.evaluation.dense.scenes import IGNORED, MIN_INK, Scenes, compose_scenes, thin_out

SIDE, GRID = 64, 8


def _plain(num: int) -> Tensor:  # [num, 3, 64, 64] uint8, each of one grey of its own
    shades = (10 + 4 * torch.arange(num)).to(torch.uint8)
    return shades[:, None, None, None].expand(num, 3, SIDE, SIDE).contiguous()


def _scenes(num: int = 10, num_scenes: int = 40, seed: int = 0) -> Scenes:
    label, group = torch.arange(num) % 3, 100 + torch.arange(num)
    return compose_scenes(_plain(num), label, group, num_scenes=num_scenes, grid=GRID, seed=seed)


def test_labels_are_those_of_a_count_of_pixels() -> None:
    scenes = _scenes()
    cell = SIDE // GRID
    seen = set()
    for scene, label, group in zip(scenes.views, scenes.label, scenes.group, strict=True):
        for n in range(GRID * GRID):
            y, x = n // GRID * cell, n % GRID * cell
            pixels = scene[0, y : y + cell, x : x + cell].numpy()
            shades, counts = np.unique(pixels[pixels < 255], return_counts=True)
            if not len(counts) or counts.max() < MIN_INK * cell**2:
                assert label[n] == group[n] == IGNORED
                continue
            drawing = (int(shades[counts.argmax()]) - 10) // 4
            assert (int(label[n]), int(group[n])) == (drawing % 3, 100 + drawing)
            seen.add(counts.max() == cell**2)
    assert seen == {False, True}


def test_a_scene_has_four_different_drawings_each_used_about_equally() -> None:
    scenes = _scenes(num=11, num_scenes=110)  # two scenes a round: 55 rounds, 8 of 11 used in each
    used = torch.zeros(11)
    for scene in scenes.views:
        shades = scene.unique()
        shades = shades[shades < 255]
        assert len(shades) == 4
        used[(shades.long() - 10) // 4] += 1
    assert int(used.sum()) == 440 and float(used.min()) > 30
    exact = _scenes(num=8, num_scenes=40)
    shades = torch.cat([scene.unique()[:-1] for scene in exact.views])
    assert torch.bincount((shades.long() - 10) // 4).tolist() == [20] * 8


def test_places_differ_in_size_and_offset_and_stay_in_their_quarter() -> None:
    sides, corners = set(), set()
    for scene in _scenes().views:
        for quarter in range(4):
            y, x = quarter // 2 * 32, quarter % 2 * 32
            inked = (scene[0, y : y + 32, x : x + 32] < 255).nonzero()
            low, high = inked.min(0).values, inked.max(0).values + 1
            height, width = (high - low).tolist()
            assert height == width and len(inked) == height * width  # whole: nothing is cut off
            sides.add(height)
            corners.add(tuple(low.tolist()))
    assert min(sides) == 24 and max(sides) == 32
    assert len(corners) > 20 and max(max(corner) for corner in corners) == 8


def test_a_drawing_is_shrunk_as_pillow_does() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (4, 8, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for p in coarse]
    drawings = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    ids = torch.arange(4)
    scenes = compose_scenes(drawings, ids, ids, num_scenes=3, grid=GRID)
    for scene, group in zip(scenes.views, scenes.group, strict=True):
        for quarter in range(4):
            y, x = quarter // 2, quarter % 2
            part = scene[:, y * 32 : y * 32 + 32, x * 32 : x * 32 + 32]
            inked = (part < 240).any(0).nonzero()
            (top, left), (bottom, right) = inked.min(0).values, inked.max(0).values + 1
            size = (int(right - left), int(bottom - top))
            shown = part[:, top:bottom, left:right].permute(1, 2, 0).numpy().astype(int)
            patch = group.view(GRID, GRID)[y * 4 + 2, x * 4 + 2]
            expected = pictures[int(patch)].resize(size, Image.Resampling.BILINEAR)
            assert np.abs(shown - np.asarray(expected, int)).max() <= 1


def test_the_seed_decides() -> None:
    first, again, other = _scenes(), _scenes(), _scenes(seed=1)
    assert torch.equal(first.views, again.views) and torch.equal(first.label, again.label)
    assert not torch.equal(first.views, other.views)


def test_thin_out_keeps_a_few_labelled_patches_of_each_drawing() -> None:
    scenes = _scenes()
    kept = thin_out(scenes, 3)
    assert not bool((kept & (scenes.label == IGNORED)).any())
    for row in range(len(kept)):
        for concept in scenes.group[row][scenes.group[row] != IGNORED].unique():
            own = scenes.group[row] == concept
            assert int((kept[row] & own).sum()) == min(3, int(own.sum()))
    assert torch.equal(kept, thin_out(scenes, 3)) and not torch.equal(
        kept, thin_out(scenes, 3, seed=1)
    )
    everything = thin_out(scenes, GRID * GRID)
    assert torch.equal(everything, scenes.label != IGNORED)


def test_unusable_input_is_refused() -> None:
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="drawings: expected at least 4, got 3"):
        compose_scenes(_plain(3), ids, ids, num_scenes=2, grid=GRID)
    ids = torch.arange(4)
    with pytest.raises(ValueError, match=r"grid: expected a divisor of 64 \(the canvas\), got 7"):
        compose_scenes(_plain(4), ids, ids, num_scenes=2, grid=7)
