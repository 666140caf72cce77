"""draw_views: random numbers, distributions beside torchvision, and what a row depends on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from scipy import stats
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.ops.views import VIEW_PARAMS, draw_views, make_views, view_specs
from tests.ops.views.drawn import draw, philox

SSL: dict[str, Any] = {"blur_probability": 0.5, "solarize_probability": 0.1}
GLOBAL = ViewConfig(count=2, **SSL)
LOCAL = ViewConfig(count=3, size=96, scale=(0.05, 0.3), ratio=(0.5, 3.0), interpolation="linear")
SIZES = ((375, 500), (500, 375), (1, 1), (1, 700), (700, 3), (64, 64), (3000, 17))


def columns(params: Tensor) -> dict[str, np.ndarray]:
    """Each parameter of all rows."""
    return dict(zip(VIEW_PARAMS, params.reshape(-1, len(VIEW_PARAMS)).T.numpy(), strict=True))


# ---- Numbers -------------------------------------------------------------------------------------

# Of Random123's kat_vectors: counter, key, words.
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_has_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 0x299F31D0A4093822])
def test_rows_are_those_of_plain_python(seed: int) -> None:
    """Every size of a picture, positions past 2^32, views of two groups."""
    views = view_specs(GLOBAL, LOCAL)
    positions = [0, 1, 2**32 - 1, 2**32, 0x0370734413198A2E, 2**63 - 1, 77]
    params = draw_views(
        torch.tensor(SIZES).unsqueeze(1), torch.tensor(positions), seed=seed, views=views
    )
    expected = [
        [draw(spec, *size, seed, position, view) for view, spec in enumerate(views)]
        for size, position in zip(SIZES, positions, strict=True)
    ]
    torch.testing.assert_close(params, torch.tensor(expected), rtol=3e-7, atol=0)


# ---- Distributions -------------------------------------------------------------------------------

COUNT = 4000


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """Rows of `COUNT` samples, one view each, of a picture of 375 x 500 pixels."""
    view = view_specs(ViewConfig(count=1, **SSL))
    sizes = torch.tensor([[375, 500]]).expand(COUNT, 1, 2).contiguous()
    return columns(draw_views(sizes, torch.arange(COUNT), seed=3, views=view))


def crops_of_torchvision(cfg: ViewConfig, height: int, width: int) -> dict[str, np.ndarray]:
    crop = tv.RandomResizedCrop(cfg.size, cfg.scale, cfg.ratio)
    rows = [crop.make_params([torch.empty(3, height, width)]) for _ in range(COUNT)]
    names = {"y": "top", "x": "left", "height": "height", "width": "width"}
    return {name: np.array([row[theirs] for row in rows]) for name, theirs in names.items()}


def test_crops_are_distributed_as_torchvisions(drawn: dict[str, np.ndarray]) -> None:
    theirs = crops_of_torchvision(ViewConfig(), 375, 500)
    for what in (
        lambda c: c["height"] * c["width"],
        lambda c: c["width"] / c["height"],
        lambda c: c["y"] / np.maximum(375 - c["height"], 1),
        lambda c: c["x"] / np.maximum(500 - c["width"], 1),
        lambda c: c["y"] + c["height"] / 2,
    ):
        assert stats.ks_2samp(what(drawn), what(theirs)).pvalue > 1e-3


def test_pictures_that_no_attempt_fits_are_cut_about_the_centre() -> None:
    view = view_specs(ViewConfig(count=1, scale=(1.0, 1.0)))
    sizes = torch.tensor([[[100, 1000]], [[1000, 100]]])
    params = columns(draw_views(sizes, torch.arange(2), seed=0, views=view))
    assert params["height"].tolist() == [100, 133] and params["width"].tolist() == [133, 100]
    assert params["y"].tolist() == [0, 433] and params["x"].tolist() == [433, 0]


def test_coins_fall_as_often_as_they_should(drawn: dict[str, np.ndarray]) -> None:
    shares = {"flip": 0.5, "hue": 0.8, "gray": 0.2, "sigma": 0.5, "solarize": 0.1}
    for name, share in shares.items():
        count = int((drawn[name] != 0).sum())
        assert stats.binomtest(count, COUNT, share).pvalue > 1e-3, name
    falls = [(drawn[name] != 0).astype(float) for name in shares]
    correlations = np.corrcoef(falls)[np.triu_indices(len(shares), 1)]
    assert np.abs(correlations).max() < 4.5 / math.sqrt(COUNT)


def test_factors_are_uniform_and_every_order_comes(drawn: dict[str, np.ndarray]) -> None:
    jittered = drawn["hue"] != 0
    cfg = ViewConfig()
    for name, centre in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)):
        half = getattr(cfg, name)
        uniform = stats.uniform(centre - half, 2 * half)
        assert stats.kstest(drawn[name][jittered], uniform.cdf).pvalue > 1e-3, name
        assert (drawn[name][~jittered] == centre).all()
    low, high = cfg.blur_sigma
    sigma = drawn["sigma"][drawn["sigma"] != 0]
    assert stats.kstest(sigma, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    counts = np.bincount(drawn["order"][jittered].astype(int), minlength=24)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


# ---- What a row depends on -----------------------------------------------------------------------


def test_a_row_depends_on_its_own_position_and_view_alone() -> None:
    views = view_specs(GLOBAL, LOCAL)
    sizes = torch.tensor(SIZES).unsqueeze(1)
    positions = torch.tensor([5, 3, 2**40, 9, 0, 1, 77])
    together = draw_views(sizes, positions, seed=1, views=views)
    for b in range(len(SIZES)):
        alone = draw_views(sizes[b : b + 1], positions[b : b + 1], seed=1, views=views)
        assert torch.equal(alone[0], together[b])
    fewer = draw_views(sizes, positions, seed=1, views=views[:2])
    assert torch.equal(fewer, together[:, :2])
    same = sizes[:1].expand(7, 1, 2).contiguous()
    rows = draw_views(same, positions, seed=1, views=[views[0]] * 5).reshape(35, -1)
    assert len(rows.unique(dim=0)) == 35
    other_seed = draw_views(same, positions, seed=2, views=[views[0]] * 5).reshape(35, -1)
    assert len(torch.cat((rows, other_seed)).unique(dim=0)) == 70


def test_the_second_view_is_cut_of_the_second_picture() -> None:
    views = view_specs(ViewConfig(count=2, scale=(1.0, 1.0), ratio=(0.001, 1000.0)), LOCAL)
    sizes = torch.tensor([[[40, 50], [300, 20]]])
    params = draw_views(sizes, torch.tensor([4]), seed=0, views=views)
    first = draw_views(sizes[:, :1].contiguous(), torch.tensor([4]), seed=0, views=views)
    second = draw_views(sizes[:, 1:].contiguous(), torch.tensor([4]), seed=0, views=views)
    assert torch.equal(params[:, [0, 2, 3, 4]], first[:, [0, 2, 3, 4]])
    assert torch.equal(params[:, 1], second[:, 1]) and not torch.equal(params[:, 1], first[:, 1])

    pictures = [torch.full((40, 50, 3), 10), torch.full((300, 20, 3), 200)]
    pixels = torch.cat([picture.flatten() for picture in pictures]).byte()
    params[..., VIEW_PARAMS.index("brightness") : VIEW_PARAMS.index("order")] = torch.tensor(
        [1.0, 1.0, 1.0, 0.0]
    )
    params[..., -1] = 0
    made = make_views(pixels, torch.tensor([[0, 6000]]), sizes, params, views=views)
    assert [int(view.unique()) for view in made] == [10, 200, 10, 10, 10]


def test_boxes_say_where_pixels_come_from() -> None:
    """Of a picture whose red grows to the right and whose green grows downwards."""
    height, width = 375, 500
    red = torch.linspace(0, 255, width).expand(height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(height, width)
    image = torch.stack((red, green, 255 - red), dim=-1).round().byte()
    plain = {"jitter_probability": 0.0, "gray_probability": 0.0}
    views = view_specs(
        ViewConfig(count=3, **plain), ViewConfig(count=3, size=48, interpolation="linear", **plain)
    )
    batch = 8
    sizes = torch.tensor([[height, width]]).expand(batch, 1, 2).contiguous()
    params = draw_views(sizes, torch.arange(batch), seed=0, views=views)
    offset = torch.zeros(batch, 1, dtype=torch.int64)
    made = make_views(image.flatten(), offset, sizes, params, views=views)
    assert {0.0, 1.0} == set(params[..., VIEW_PARAMS.index("flip")].flatten().tolist())
    for v, (view, of) in enumerate(zip(made, views, strict=True)):
        for b in range(batch):
            y, x, h, w, flip = params[b, v, :5].tolist()
            at = (torch.arange(of.size) + 0.5) / of.size
            across = (x + at * w - 0.5) * 255 / (width - 1)
            down = (y + at * h - 0.5) * 255 / (height - 1)
            across = across.flip(0) if flip else across
            inside = slice(2, -2)
            assert (view[b, 0].float() - across).abs()[:, inside].max() <= 1.5
            assert (view[b, 1].float() - down[:, None]).abs()[inside].max() <= 1.5
