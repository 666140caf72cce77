"""Views on their way to an encoder: normalised as they are, or blended as mixup does."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import MixUp
from torchvision.transforms.v2 import functional as vision

from m3i_fast.objectives.targets import (
    blend,
    cell_contrast,
    normalise_views,
    normalised_pixels,
    prefer_cells,
)
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD

_BLACK = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_blend_is_torchvisions_mixup(share: float) -> None:
    rng = torch.Generator().manual_seed(0)
    views = torch.randint(256, (4, 3, 9, 7), dtype=torch.uint8, generator=rng)
    members = torch.arange(4)[:, None] - torch.tensor([0, 1])  # MixUp rolls the batch by one
    images = vision.normalize(
        vision.to_dtype(views, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD)
    )
    expected = MixUp(num_classes=2).transform(
        images, {"lam": share, "batch_size": 4, "labels": None}
    )
    shares = torch.full((4,), share)
    got = blend(views, members % 4, shares, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    rounded = blend(views, members % 4, shares, torch.bfloat16)
    assert torch.equal(rounded, got.bfloat16())


def test_each_input_is_blended_by_its_own_share() -> None:
    views = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 3, 2, 2)
    low, high = normalise_views(views, torch.tensor([0, 1]), torch.float32).double()
    members, share = torch.tensor([[0, 1], [1, 0], [0, 0]]), torch.tensor([0.25, 0.25, 0.7])
    got = blend(views, members, share, torch.float32).double()
    expected = torch.stack([0.25 * low + 0.75 * high, 0.25 * high + 0.75 * low, low])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_chosen_row_is_that_view_normalised() -> None:
    rng = torch.Generator().manual_seed(0)
    views = torch.randint(256, (5, 3, 6, 4), dtype=torch.uint8, generator=rng)
    rows = torch.tensor([4, 0, 4, 1, 2, 3])[::2]  # strided
    expected = vision.normalize(
        vision.to_dtype(views[rows], torch.float32, scale=True),
        list(IMAGENET_MEAN),
        list(IMAGENET_STD),
    )
    torch.testing.assert_close(
        normalise_views(views, rows, torch.float32), expected, rtol=0, atol=1e-6
    )


def test_pixels_are_standardised_by_numpy() -> None:
    """MAE's target: each patch by its own mean and unbiased variance, pixels row by row."""
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    own = normalised_pixels(images, 4)
    patch = images[1, :, 4:, :4].permute(1, 2, 0).reshape(-1).numpy()  # third of four
    expected = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
    np.testing.assert_allclose(own[1, 2].numpy(), expected, rtol=1e-9)


def test_a_cells_contrast_is_by_numpy() -> None:
    rng = np.random.default_rng(0)
    views = rng.integers(0, 256, (3, 3, 8, 12), dtype=np.uint8)
    views[:, :, :4, :4] = np.array([7, 200, 30], dtype=np.uint8)[:, None, None]  # of one colour
    views[1, :, 4:, 8:] = 50
    views[1, 2, 5, 9] = 57
    expected = [
        [
            max(int(np.ptp(view[c, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4])) for c in range(3))
            for i in range(2)
            for j in range(3)
        ]
        for view in views
    ]
    assert cell_contrast(torch.from_numpy(views), 4).tolist() == expected
    assert expected[0][0] == 0 and expected[1][5] == 7


def test_wanted_cells_are_taken_first_and_again() -> None:
    cells = torch.tensor([[4, 2, 0, 3], [4, 2, 0, 3], [4, 2, 0, 3]])
    wanted = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    assert prefer_cells(cells, wanted, 4).tolist() == [[0, 3, 0, 3], [4, 2, 0, 3], [4, 2, 0, 3]]
    assert prefer_cells(cells, wanted, 1).tolist() == [[0], [4], [4]]


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (
            lambda: blend(_BLACK, torch.tensor([[0, 0, 0]]), torch.ones(1), torch.float32),
            r"members: expected shape \[P, 2\], got \[1, 3\]",
        ),
        (
            lambda: blend(_BLACK, torch.tensor([[0, 0]]), torch.ones(2), torch.float32),
            r"share: expected shape \[1\] float32, got \[2\] torch.float32",
        ),
        (
            lambda: blend(_BLACK, torch.tensor([[0, 0]]), torch.ones(1).double(), torch.float32),
            r"share: .* got \[1\] torch.float64",
        ),
    ],
)
def test_a_wrong_blend_is_named(make, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        make()
