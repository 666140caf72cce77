"""Every step of a view against torchvision's function of the same parameters, on uint8 tensors."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import draw_views, view_specs
from tests.ops.views.oracle import (
    Box,
    by_torchvision,
    differences,
    exact,
    noise,
    ours,
    row,
    smooth,
    spec,
)

pytestmark = exact

FILTERS = ("cubic", "linear")
PICTURES = {"noise": noise(375, 500), "smooth": smooth(375, 500)}
BOX = (10, 20, 300, 400)
every_picture = pytest.mark.parametrize("image", PICTURES.values(), ids=PICTURES.keys())

# Values of the blur that are a level off; see make_views's docstring.
BLUR_SHARE = 1e-4


def assert_same_bits(
    image: Tensor, params: Tensor, size: int, interpolation: str = "cubic"
) -> None:
    view = spec(size, interpolation=interpolation)
    assert torch.equal(ours(image, params, view), by_torchvision(image, params, view))


# ---- Crop, resize, flip --------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("box", "size"),
    [
        (BOX, 224),
        ((0, 0, 375, 500), 64),  # the whole picture
        ((75, 37, 224, 300), 224),  # one axis as it is
        ((75, 37, 100, 224), 224),
        ((74, 1, 224, 224), 224),  # both
        ((5, 490, 20, 10), 96),  # larger
        ((5, 7, 1, 1), 20),
        ((0, 0, 1, 500), 33),
        ((0, 499, 375, 1), 33),
        ((374, 499, 1, 1), 7),  # the last pixel
        ((3, 1, 371, 498), 1),
    ],
)
def test_crop_and_resize(box: Box, size: int, interpolation: str) -> None:
    for image in PICTURES.values():
        for flip in (0.0, 1.0):
            assert_same_bits(image, row(box, flip=flip), size, interpolation)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_any_size_to_any_size(interpolation: str) -> None:
    rng = random.Random(0)
    for number in range(300):
        height, width = rng.randint(1, 40), rng.randint(1, 40)
        h, w = rng.randint(1, height), rng.randint(1, width)
        box = (rng.randint(0, height - h), rng.randint(0, width - w), h, w)
        params = row(box, flip=float(number % 2))
        assert_same_bits(noise(height, width, number), params, rng.randint(1, 40), interpolation)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(1, 9000), (9000, 1), (2, 3000), (3001, 7)])
def test_long_pictures(height: int, width: int, interpolation: str) -> None:
    """Hundreds of taps, whose weights are as fine as they get."""
    for size in (3, 64):
        assert_same_bits(noise(height, width), row((0, 0, height, width)), size, interpolation)


def test_a_white_picture_stays_white() -> None:
    white = torch.full((375, 500, 3), 255, dtype=torch.uint8)
    for size in (64, 224):
        assert (ours(white, row(BOX), spec(size)) == 255).all()


# ---- Colours -------------------------------------------------------------------------------------


@every_picture
@pytest.mark.parametrize(
    ("step", "factors"),
    [
        ("brightness", (0.0, 0.3, 0.9999, 1.4, 2.0, 3.0)),
        ("contrast", (0.0, 0.3, 0.9999, 1.4, 2.0, 3.0)),
        ("saturation", (0.0, 0.3, 0.9999, 1.4, 2.0, 3.0)),
        ("hue", (-0.5, -0.31, -1e-6, 1e-9, 0.1, 0.25, 0.5)),
        ("gray", (1.0,)),
        ("solarize", (1.0,)),
    ],
)
def test_one_step(image: Tensor, step: str, factors: tuple[float, ...]) -> None:
    for factor in factors:
        for size in (61, 224):
            assert_same_bits(image, row(BOX, **{step: factor}), size)


@every_picture
@pytest.mark.parametrize("order", range(24))
def test_each_order_of_colours(image: Tensor, order: int) -> None:
    b, c, s, h = torch.rand(4, generator=torch.Generator().manual_seed(order)).tolist()
    changes = {"brightness": 0.4 + b, "contrast": 0.4 + c, "saturation": 0.4 + s, "hue": h - 0.5}
    changes |= {"gray": float(order % 6 == 0), "solarize": float(order % 5 == 0)}
    assert_same_bits(image, row(BOX, order=order, **changes), 96)
    without = dict.fromkeys(random.Random(order).sample(sorted(changes), 3))
    some = {name: value for name, value in changes.items() if name not in without}
    assert_same_bits(image, row(BOX, order=order, **some), 95)


@pytest.mark.parametrize("hue", [-0.5, -0.17, 0.01, 0.4])
def test_hue_of_every_sector_and_of_grays(hue: float) -> None:
    """Every triple of 24 levels, the extremes and neighbours of them among these."""
    levels = torch.tensor([*range(4), *range(7, 247, 15), *range(252, 256)])
    colours = torch.cartesian_prod(levels, levels, levels).byte()
    side = 118
    image = torch.cat((colours, colours))[: side * side].view(side, side, 3)
    assert len(colours) <= side * side
    assert_same_bits(image, row((0, 0, side, side), hue=hue), side)


# ---- Blur ----------------------------------------------------------------------------------------


@every_picture
@pytest.mark.parametrize("sigma", [0.001, 0.1, 0.5, 1.0, 2.0, 10.0, 1000.0])
def test_blur(image: Tensor, sigma: float) -> None:
    for size, kernel, solarize in ((224, None, 0.0), (96, 31, 1.0), (12, 23, 0.0), (2, 3, 0.0)):
        view = spec(size, blur_kernel_size=kernel)
        params = row(BOX, sigma=sigma, solarize=solarize)
        made, expected = ours(image, params, view), by_torchvision(image, params, view)
        if solarize:  # which makes a level at its threshold 255 of them
            params[-1] = 0
            inverted = ours(image, params, view)
            assert torch.equal(made, torch.where(inverted >= 128, 255 - inverted, inverted))
            made, expected = inverted, by_torchvision(image, params, view)
        most, share = differences(made, expected)
        assert most <= 1 and share <= max(BLUR_SHARE, 1.5 / made.numel())


def test_blur_of_one_pixel_changes_nothing() -> None:
    view = spec(64, blur_kernel_size=1)
    assert torch.equal(
        ours(PICTURES["noise"], row(BOX, sigma=2.0), view), ours(PICTURES["noise"], row(BOX), view)
    )


# ---- All -----------------------------------------------------------------------------------------


@every_picture
def test_drawn_views(image: Tensor) -> None:
    """All steps as drawn; the one level of a blur may grow by the solarize after it alone."""
    settings = {"blur_probability": 0.5, "solarize_probability": 0.2}
    views = view_specs(
        ViewConfig(count=8, **settings),
        ViewConfig(count=16, size=64, scale=(0.05, 0.3), interpolation="linear", **settings),
    )
    params = draw_views(torch.tensor([[[375, 500]]]), torch.tensor([7]), seed=0, views=views)
    blurs = 0
    for view, of in zip(views, params[0], strict=True):
        made, expected = ours(image, of, view), by_torchvision(image, of, view)
        if of[-2] == 0:
            assert torch.equal(made, expected)
            continue
        blurs += 1
        most, share = differences(made, expected)
        assert share <= max(BLUR_SHARE, 1.5 / made.numel()) and (most <= 1 or of[-1] == 1)
    assert 0 < blurs < len(views)
