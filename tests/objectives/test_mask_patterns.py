"""Who gets which cells: exact shares, whole blocks, and CutMix's rectangle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import CutMix

from m3i_fast.config.objective.mixing import Pattern
from m3i_fast.objectives.mask_patterns import NOBODY, box_distance, deal_cells, deal_grids

PATTERNS: tuple[Pattern, ...] = ("blocks", "rectangle")
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


def _deal(
    pattern: Pattern,
    *,
    grid: int,
    block: int,
    num_images: int = 2,
    num_own: int | None = None,
    num_draws: int = 16,
    seed: int = 0,
) -> Tensor:  # [K, D, n]
    rng = torch.Generator().manual_seed(seed)
    return deal_cells(
        pattern,
        num_images=num_images,
        num_own=grid * grid // num_images if num_own is None else num_own,
        grid=(grid, grid),
        block=block,
        uniform=lambda count: torch.rand(num_draws, count, generator=rng),
    )


def _flags(cells: Tensor, grid: int) -> Tensor:  # [D, n] -> [D, grid, grid] bool
    flags = torch.zeros(len(cells), grid * grid, dtype=torch.bool)
    return flags.scatter_(1, cells, True).view(-1, grid, grid)


@every_pattern
@pytest.mark.parametrize("num_images", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "block"), [(8, 2), (14, 2), (14, 4), (7, 1), (16, 3), (2, 2)])
def test_every_image_gets_its_share_and_no_cell_is_anothers(
    pattern: Pattern, grid: int, block: int, num_images: int
) -> None:
    cells = _deal(pattern, grid=grid, block=block, num_images=num_images)
    share = grid * grid // num_images
    assert cells.shape == (num_images, 16, share)
    for draw in cells.unbind(1):
        assert all(row == sorted(row) for row in draw.tolist())
        together = draw.flatten().tolist()
        assert len(set(together)) == num_images * share
        assert set(together) <= set(range(grid * grid))


@every_pattern
@pytest.mark.parametrize("num_images", [2, 4])
def test_cells_come_in_whole_blocks(pattern: Pattern, num_images: int) -> None:
    """The share of each is a whole number of blocks here, so none is shared."""
    cells = _deal(pattern, grid=12, block=3, num_images=num_images, num_draws=64)
    for image in cells:
        blocks = _flags(image, 12).unfold(1, 3, 3).unfold(2, 3, 3).flatten(3)
        assert (blocks.all(-1) | ~blocks.any(-1)).all()


@every_pattern
def test_one_block_at_most_is_shared_by_two_images(pattern: Pattern) -> None:
    cells = _deal(pattern, grid=14, block=4)
    first = _flags(cells[0], 14)
    parts = torch.stack(
        [
            first[:, y : y + 4, x : x + 4].flatten(1).float().mean(1)
            for y in range(0, 14, 4)
            for x in range(0, 14, 4)
        ],
        1,
    )
    assert (((parts > 0) & (parts < 1)).sum(1) <= 1).all()


@every_pattern
def test_every_cell_is_dealt_to_every_image(pattern: Pattern) -> None:
    """And the draws are not one another: each cell is the first image's about as often as not."""
    cells = _deal(pattern, grid=6, block=1, num_draws=2000)
    shown = torch.stack([_flags(image, 6).float().mean(0) for image in cells])
    torch.testing.assert_close(shown.sum(0), torch.ones(6, 6))
    # By symmetry: corners, edges and the middle each agree among themselves.
    for like in (shown[0].flip(0), shown[0].flip(1), shown[0].T):
        torch.testing.assert_close(shown[0], like, rtol=0, atol=0.06)
    middle, corner = float(shown[0, 2:4, 2:4].mean()), float(shown[0, 0, 0])
    if pattern == "blocks":
        assert middle == pytest.approx(0.5, abs=0.03) and corner == pytest.approx(0.5, abs=0.06)
    else:  # a rectangle reaches the middle from anywhere
        assert middle > 0.7 and 0.1 < corner < 0.4


def test_another_seed_deals_other_cells() -> None:
    for pattern in PATTERNS:
        one, two, again = (_deal(pattern, grid=8, block=2, seed=seed) for seed in (0, 1, 0))
        assert torch.equal(one, again) and not torch.equal(one, two)
        assert not torch.equal(one[:, 0], one[:, 1])


def test_the_nearest_cells_are_those_of_cutmixs_box() -> None:
    """torchvision's boxes, where they are not cut off: as many cells, nearest to their centre."""
    torch.manual_seed(0)
    transform, side, seen = CutMix(num_classes=2), 15, 0
    for _ in range(200):
        params = transform.make_params([torch.zeros(2, 3, side, side)])
        x1, y1, x2, y2 = (int(v) for v in params["box"])
        area, height, width = (x2 - x1) * (y2 - y1), y2 - y1, x2 - x1
        if area == 0 or height != width or area == side * side:
            continue  # cut off by a border, or nothing to see
        point = torch.tensor([[(y1 + y2) / 2, (x1 + x2) / 2]])
        order = box_distance(point, torch.ones(1), torch.tensor([[side]]), side * side)[0].argsort()
        expected = torch.zeros(side, side, dtype=torch.bool)
        expected[y1:y2, x1:x2] = True
        assert torch.equal(_flags(order[None, :area], side)[0], expected)
        seen += 1
    assert seen > 50


@every_pattern
@pytest.mark.parametrize(("num_images", "block"), [(1, 2), (2, 3), (3, 1)])
def test_grids_together_are_dealt_as_each_alone(
    pattern: Pattern, num_images: int, block: int
) -> None:
    grids = [(3, 7), (1, 4), (6, 6), (2, 2), (7, 3), (8, 5)]
    own = [rows * columns // (num_images + 1) for rows, columns in grids]
    drawn = torch.rand(len(grids), 100, generator=torch.Generator().manual_seed(0))
    part = deal_grids(
        pattern,
        num_images=num_images,
        num_own=torch.tensor(own),
        grids=torch.tensor(grids),
        block=block,
        uniform=lambda count: drawn[:, :count],
    )
    assert part.shape == (len(grids), 40)
    for number, (grid, num_own) in enumerate(zip(grids, own, strict=True)):

        def alone(count: int, number: int = number) -> Tensor:
            return drawn[[number], :count]

        cells = deal_cells(
            pattern, num_images=num_images, num_own=num_own, grid=grid, block=block, uniform=alone
        )
        for image in range(num_images):
            assert (part[number] == image).nonzero()[:, 0].tolist() == cells[image, 0].tolist()
        assert (part[number] == NOBODY).sum() == 40 - num_images * num_own


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_an_aspect_is_the_boxs_height_over_its_width(aspect: float) -> None:
    point = torch.tensor([[50.0, 50.0]])
    distance = box_distance(point, torch.tensor([aspect]), torch.tensor([[100]]), 100 * 100)
    near = (distance < 20).view(100, 100)
    height, width = int(near.any(1).sum()), int(near.any(0).sum())
    assert near.sum() == height * width  # a box
    assert height / width == pytest.approx(aspect, rel=0.05)
    assert height * width == pytest.approx(40**2, rel=0.03)


def _bounds(flags: Tensor) -> tuple[slice, slice]:
    """Of the bounding box, rows and columns."""
    lines = (flags.any(1).nonzero(), flags.any(0).nonzero())
    rows, columns = (slice(int(line[0]), int(line[-1]) + 1) for line in lines)
    return rows, columns


def _is_box_and_part_of_a_line(flags: Tensor) -> bool:
    """Cells join line by line: all of a bounding box, but for some of one of its four sides."""
    box = flags[_bounds(flags)]
    return any(bool(rest.all()) for rest in (box, box[1:], box[:-1], box[:, 1:], box[:, :-1]))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_rectangle_is_a_box_of_its_share(share: float) -> None:
    grid = 14
    cells = _deal("rectangle", grid=grid, block=1, num_own=round(share * grid**2), num_draws=200)
    flags = _flags(cells[0], grid)
    assert all(map(_is_box_and_part_of_a_line, flags))
    ratios = []
    for rows, columns in map(_bounds, flags):
        if min(rows.start, columns.start) > 0 and max(rows.stop, columns.stop) < grid:
            ratios.append((rows.stop - rows.start) / (columns.stop - columns.start))
    if share <= 0.25:  # else few lie inside
        assert min(ratios) < 0.75 and max(ratios) > 1.33
        assert 1 / 3 < min(ratios) and max(ratios) < 3  # 1:2 to 2:1, of whole cells


def test_the_next_nearest_cells_are_the_next_images() -> None:
    """Each image's cells make up a box together with those of the images before it."""
    cells = _deal("rectangle", grid=12, block=1, num_images=3, num_draws=100)
    for until in (1, 2):
        flags = _flags(cells[:until].movedim(0, 1).flatten(1), 12)
        assert all(map(_is_box_and_part_of_a_line, flags))


def test_ties_are_broken_at_random() -> None:
    """Of cells equally far, a plain sort would always give the upper left ones."""
    grid = 9
    cells = _deal("rectangle", grid=grid, block=1, num_own=40, num_draws=3000)
    shown = _flags(cells[0], grid).float().mean(0)
    torch.testing.assert_close(shown, shown.flip(0, 1), rtol=0, atol=0.06)
