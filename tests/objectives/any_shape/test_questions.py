"""Where targets lie for pictures of any shape, and rows of pictures that weigh alike, by others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.transformer.positions import fractions_of_centres, grid_positions
from m3i_fast.models.transformer.ragged import Ragged, joined, prefer_rows
from m3i_fast.objectives.losses.dense import gaussian_of_rows
from m3i_fast.objectives.losses.similarity import cosine_smooth_l1
from m3i_fast.objectives.targets import cell_contrast, patch_contrast, prefer_cells
from m3i_fast.ops import gaussian
from m3i_fast.ops.views import cut_patches

LENGTHS = (3, 1, 5, 2)


def affine(box: Tensor, grid: Tensor) -> Tensor:  # [5], [2] -> [3, 3]
    """From (row, column, 1) in cells of a view to pixels of the upright image."""
    top, left, height, width, flip = box.tolist()
    region = torch.tensor([[height, 0, top], [0, width, left], [0, 0, 1]])
    mirror = torch.tensor([[1, 0, 0], [0, 1 - 2 * flip, flip], [0, 0, 1]])
    shrink = torch.diag(torch.tensor([1 / int(grid[0]), 1 / int(grid[1]), 1.0]))
    return region.double() @ mirror.double() @ shrink.double()


@pytest.mark.parametrize("input_grid, target_grid", [((3, 8), (5, 2)), ((4, 4), (7, 3))])
def test_targets_lie_where_affine_maps_have_them(
    input_grid: tuple[int, int], target_grid: tuple[int, int]
) -> None:
    rng = torch.Generator().manual_seed(0)
    shown, target = torch.tensor(input_grid), torch.tensor(target_grid)
    for flips in ((0, 0), (1, 0), (0, 1), (1, 1)):
        boxes = torch.rand(2, 5, generator=rng) * 10 + 20
        boxes[:, 4] = torch.tensor(flips)
        place = torch.cartesian_prod(*(torch.arange(n) for n in target_grid))
        fraction, ratio = fractions_of_centres(
            boxes[:1].expand(len(place), -1),
            boxes[1:].expand(len(place), -1),
            (place + 0.5) / target,
        )
        found = grid_positions(fraction, ratio, input_grid=shown, target_grid=target)
        to_input = torch.linalg.solve(affine(boxes[0], shown), affine(boxes[1], target))
        ends = torch.cat([place + 0.5, torch.ones(len(place), 1)], 1).double()
        expected = (ends @ to_input.T)[:, :2] - 0.5
        torch.testing.assert_close(found[:, :2].double(), expected, rtol=1e-5, atol=1e-5)
        size = to_input.diagonal()[:2].abs().log().expand(len(place), -1)
        torch.testing.assert_close(found[:, 2:].double(), size, rtol=1e-5, atol=1e-5)


def ragged(*, width: int = 4, seed: int = 0) -> Ragged:
    rng = torch.Generator().manual_seed(seed)
    return Ragged(torch.randn(sum(LENGTHS), width, generator=rng, dtype=torch.float64), LENGTHS)


def test_rows_are_those_of_each_picture() -> None:
    rows = ragged()
    parts = rows.values.split(list(LENGTHS))
    means = torch.stack([part.mean(0) for part in parts])
    torch.testing.assert_close(rows.mean(), means)
    assert torch.equal(rows.pictures(1, 2).values, torch.cat(parts[1:3]))
    chosen = rows.select(torch.tensor([2, 0, 2]))
    assert torch.equal(chosen.values, torch.cat([parts[2], parts[0], parts[2]]))
    index = Ragged(torch.tensor([2, 0, 0, 4, 4, 1, 1]), (2, 1, 3, 1))
    picked = torch.cat([parts[0][[2, 0]], parts[1][[0]], parts[2][[4, 4, 1]], parts[3][[1]]])
    assert torch.equal(rows.gather(index).values, picked)
    assert torch.equal(rows.padded(), torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))
    assert torch.equal(
        rows.spread(torch.arange(4)), torch.tensor([0] * 3 + [1] + [2] * 5 + [3] * 2)
    )
    both = joined([rows, chosen])
    assert both.lengths == (*LENGTHS, 5, 3, 5) and len(both.values) == sum(both.lengths)
    weighted = (rows.shares(torch.float64)[:, None] * rows.values).sum(0)
    torch.testing.assert_close(weighted, means.mean(0))


@pytest.mark.parametrize("number", [0, 2, 4])
def test_cells_of_contrast_are_preferred_as_of_squares(number: int) -> None:
    rng = torch.Generator().manual_seed(1)
    cells = Ragged(torch.cat([torch.randperm(n, generator=rng) for n in LENGTHS]), LENGTHS)
    for share in (0.0, 0.4, 1.0):
        wanted = torch.rand(sum(LENGTHS), generator=rng) < share
        found = prefer_rows(cells, wanted, number)
        for own, has, got in zip(
            cells.values.split(list(LENGTHS)),
            wanted.split(list(LENGTHS)),
            found.values.split(list(found.lengths)),
            strict=True,
        ):
            by_cell = torch.empty_like(has)
            by_cell[own] = has
            most = min(number or len(own), len(own))
            assert torch.equal(got, prefer_cells(own[None], by_cell[None], most)[0])


def test_contrast_of_patches_is_that_of_cells() -> None:
    rng = torch.Generator().manual_seed(0)
    views = torch.randint(0, 256, (3, 3, 16, 24), generator=rng, dtype=torch.uint8)
    patches = torch.cat([cut_patches(view, 8) for view in views])
    assert torch.equal(patch_contrast(patches), cell_contrast(views, 8).flatten())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("weight, centred", [(0.0, False), (0.3, False), (0.3, True)])
def test_the_gaussian_weighs_pictures_alike(normalise: bool, weight: float, centred: bool) -> None:
    z_hat, z = ragged().values.requires_grad_(), ragged(seed=1).values
    shares = ragged().shares(torch.float64)
    options = {"normalise": normalise, "decorrelation_weight": weight, "centred": centred}
    found = gaussian_of_rows(z_hat, z, shares=shares, sigma=0.7, **options)  # type: ignore[arg-type]
    t = F.layer_norm(z, z.shape[-1:]) if normalise else z
    fit = (shares * (t - z_hat).square().mean(1)).sum() / (2 * 0.7**2)
    mean = shares @ t
    moment = torch.einsum("r,ri,rj->ij", shares, t, t) - centred * torch.outer(mean, mean)
    spread = torch.einsum("r,ri,ij,rj->", shares, z_hat, moment, z_hat) / z.shape[1]
    expected = fit + weight * spread
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # The op gives the gradient of the spread by rows as if the moment were constant, as it is here.
    (of_found,) = torch.autograd.grad(found, z_hat, retain_graph=True)
    (of_expected,) = torch.autograd.grad(expected, z_hat)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-12, atol=1e-12)
    even = torch.full_like(shares, 1 / len(shares))
    whole = gaussian(z_hat, z, sigma=0.7, **options)  # type: ignore[arg-type]
    weighed = gaussian_of_rows(z_hat, z, shares=even, sigma=0.7, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(weighed, whole, rtol=1e-12, atol=1e-12)


def test_radios_loss_weighs_pictures_alike() -> None:
    z_hat, z = ragged(), ragged(seed=1)
    parts = zip(z_hat.values.split(list(LENGTHS)), z.values.split(list(LENGTHS)), strict=True)
    means = torch.stack([cosine_smooth_l1(*part) for part in parts]).mean()
    shares = z.shares(torch.float64)
    torch.testing.assert_close(cosine_smooth_l1(z_hat.values, z.values, shares=shares), means)
