"""Every step of a view against torchvision's function of the same parameters."""

from __future__ import annotations

import pytest
import torch

from tests.ops.views.oracle import (
    Box,
    by_torchvision,
    differences,
    noise,
    ours,
    row,
    smooth,
    spec,
)

FILTERS = ("cubic", "linear")
PICTURES = {"noise": noise(375, 500), "smooth": smooth(375, 500)}
BOX = (10, 20, 300, 400)


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
        ((3, 1, 371, 498), 1),
    ],
)
def test_crop_and_resize_have_torchvisions_bits(box: Box, size: int, interpolation: str) -> None:
    view = spec(size, interpolation=interpolation)
    for image in PICTURES.values():
        for flip in (0.0, 1.0):
            params = row(box, flip=flip)
            made = ours(image, params, view)
            assert torch.equal(made, by_torchvision(image, params, view))


@pytest.mark.parametrize("image", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("order", range(24))
def test_each_order_of_colours_has_torchvisions_bits(image: torch.Tensor, order: int) -> None:
    rng = torch.Generator().manual_seed(order)
    b, c, s, h = torch.rand(4, generator=rng).tolist()
    changes = {"brightness": 0.4 + b, "contrast": 0.4 + c, "saturation": 0.4 + s, "hue": h - 0.5}
    params = row(
        BOX, order=order, gray=float(order % 6 == 0), solarize=float(order % 5 == 0), **changes
    )
    view = spec(96)
    assert torch.equal(ours(image, params, view), by_torchvision(image, params, view))


@pytest.mark.parametrize("image", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 10.0])
def test_blur_is_torchvisions(image: torch.Tensor, sigma: float) -> None:
    view = spec(224)
    params = row(BOX, sigma=sigma)
    most, share = differences(ours(image, params, view), by_torchvision(image, params, view))
    assert most <= 1 and share < 3e-4
