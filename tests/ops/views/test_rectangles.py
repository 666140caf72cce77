"""Views of any sides, as patches: torchvision's bits, and those of `make_views` for a square."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import (
    cut_patches,
    draw_views,
    make_patches,
    make_views,
    view_specs,
)
from tests.ops.views.oracle import by_torchvision, differences, exact, noise, row, smooth, spec
from tests.shared.ops.cpu_capability import run_held_to

PATCH = 4
SIZES = (90, 70), (40, 130), (64, 64), (9, 200)
VIEWS = view_specs(
    ViewConfig(count=2, size=32, ratio=(0.5, 2.0), blur_probability=0.5, solarize_probability=0.3),
    ViewConfig(count=1, size=16, interpolation="linear", blur_probability=0.5),
)


def one(image: Tensor, params: Tensor, grid: tuple[int, int], **settings: Any) -> Tensor:
    (patches,) = make_patches(
        image.reshape(-1),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.tensor([[image.shape[:2]]]),
        params.view(1, 1, -1),
        torch.tensor([[grid]]),
        views=[spec(32, **settings)],
        patch_size=PATCH,
    )
    return patches


def call(pictures: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments for pictures of several sizes, and rows and columns of their views."""
    sizes = torch.tensor([SIZES, SIZES[::-1]][:pictures]).transpose(0, 1).contiguous()
    images = [noise(*size, seed=i) for i, size in enumerate(sizes.flatten(0, 1).tolist())]
    num_bytes = sizes.prod(-1).flatten() * 3
    arguments = {
        "pixels": torch.cat([image.flatten() for image in images]),
        "offset": (num_bytes.cumsum(0) - num_bytes).view(len(SIZES), -1),
        "image_size": sizes,
        "params": draw_views(sizes, torch.arange(len(SIZES)), seed=3, views=VIEWS),
    }
    rng = torch.Generator().manual_seed(1)
    return arguments, torch.randint(1, 12, (len(SIZES), len(VIEWS), 2), generator=rng)


CHANGES: dict[str, dict[str, float]] = {
    "plain": {},
    "mirrored": {"flip": 1},
    "colours": {"brightness": 1.3, "contrast": 0.7, "saturation": 1.4, "hue": 0.08, "order": 13},
    "gray, solarized": {"gray": 1, "solarize": 1},
}


@exact
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("grid", [(1, 1), (3, 8), (14, 5), (1, 30), (7, 7), (25, 2)])
@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_the_bits_are_torchvision_s(
    interpolation: str, grid: tuple[int, int], changes: dict[str, float]
) -> None:
    sides = PATCH * grid[0], PATCH * grid[1]
    view = spec(32, interpolation=interpolation)
    for image in (noise(120, 90), smooth(75, 160)):
        params = row((7, 3, 60, 80), **changes)
        expected = by_torchvision(image, params, view, sides)
        assert torch.equal(
            one(image, params, grid, interpolation=interpolation), cut_patches(expected, PATCH)
        )


@exact
@pytest.mark.parametrize("grid", [(2, 9), (9, 2), (1, 1), (12, 20)])
@pytest.mark.parametrize("sigma", [0.3, 1.7])
def test_a_blur_is_a_level_off_at_most(sigma: float, grid: tuple[int, int]) -> None:
    image, params = noise(90, 130), row((2, 5, 70, 110), sigma=sigma)
    view = spec(32, blur_kernel_size=9)
    expected = by_torchvision(image, params, view, (PATCH * grid[0], PATCH * grid[1]))
    most, share = differences(
        one(image, params, grid, blur_kernel_size=9), cut_patches(expected, PATCH)
    )
    assert most <= 1 and share < 1e-3


@pytest.mark.parametrize("pictures", [1, 2])
def test_a_square_is_a_view_s(pictures: int) -> None:
    arguments, _ = call(pictures)
    grids = torch.tensor([[view.size // PATCH] * 2 for view in VIEWS]).expand(len(SIZES), -1, -1)
    made = make_patches(**arguments, grids=grids, views=VIEWS, patch_size=PATCH)
    views = make_views(**arguments, views=VIEWS)
    for patches, squares in zip(made, views, strict=True):
        assert torch.equal(patches, cut_patches(squares, PATCH).flatten(0, 1))


def test_each_sample_s_patches_are_its_own_in_any_batch_and_threads() -> None:
    arguments, grids = call(pictures=2)
    made = make_patches(**arguments, grids=grids, views=VIEWS, patch_size=PATCH)
    for b in range(len(SIZES)):
        own = {k: x if k == "pixels" else x[b : b + 1] for k, x in arguments.items()}
        alone = make_patches(
            **own, grids=grids[b : b + 1], views=VIEWS, patch_size=PATCH, num_threads=3
        )
        for v, patches in enumerate(made):
            parts = patches.split(grids[:, v].prod(1).tolist())
            assert torch.equal(parts[b], alone[v])


_DIGEST = "from tests.ops.views.test_rectangles import digest; print(digest())"


def digest() -> str:
    arguments, grids = call(pictures=2)
    made = make_patches(**arguments, grids=grids, views=VIEWS, patch_size=PATCH)
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in made)).hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_gives_the_same_bits(capability: str) -> None:
    assert run_held_to(capability, _DIGEST).strip() == digest()


def test_no_samples_have_no_patches() -> None:
    arguments, grids = call()
    none = {k: x if k == "pixels" else x[:0] for k, x in arguments.items()}
    made = make_patches(**none, grids=grids[:0], views=VIEWS, patch_size=PATCH)
    assert [tuple(part.shape) for part in made] == [(0, 48)] * len(VIEWS)


def test_wrong_grids_are_named() -> None:
    arguments, grids = call()
    with pytest.raises(ValueError, match=r"grids: expected \[4, 3, 2\], got \[4, 2, 2\]"):
        make_patches(**arguments, grids=grids[:, :2], views=VIEWS, patch_size=PATCH)
    with pytest.raises(RuntimeError, match="view 0: expected a size of 1 to 16384 pixels, got 0"):
        make_patches(**arguments, grids=0 * grids, views=VIEWS, patch_size=PATCH)
