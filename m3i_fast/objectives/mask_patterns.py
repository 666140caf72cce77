"""Random patterns: which cells of the token grid each image of an input shows.

Legend: D draws, K images, N cells of the grid, n <= N / K cells an image shows, r x c blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from m3i_fast.config.objective.mixing import Pattern

NOBODY = -1
"""Number of the image that has a cell left over where K does not divide the grid."""
Uniform = Callable[[int], Tensor]
"""Returns a count of random numbers in [0, 1) for each draw: [D, count] fp32."""


def deal_cells(
    pattern: Pattern,
    *,
    num_images: int,
    num_own: int,
    grid: tuple[int, int],
    block: int,
    uniform: Uniform,
) -> Tensor:  # [K, D, n] int64, ascending
    """Assign n = `num_own` cells of `grid`, rows and columns, to each image, as `deal_grids`."""
    part = deal_grids(
        pattern,
        num_images=num_images,
        num_own=torch.tensor([num_own]),
        grids=torch.tensor([grid]),
        block=block,
        uniform=uniform,
    )
    order = part.masked_fill(part == NOBODY, num_images).argsort(dim=1, stable=True)
    return order[:, : num_images * num_own].unflatten(1, (num_images, num_own)).movedim(1, 0)


def deal_grids(
    pattern: Pattern,
    *,
    num_images: int,
    num_own: Tensor,  # [D] or [1] int64, n of each draw
    grids: Tensor,  # [D, 2] or [1, 2] int64: rows and columns of each draw
    block: int,
    uniform: Uniform,
) -> Tensor:  # [D, M] int64, for M the cells of the largest grid
    """Return the number of the image that gets each cell, NOBODY for what is left over or padding.

    The blocks of `block` x `block` cells are put in order, at random or by their distance from a
    random point; the first n cells go to the first image, the next n to the second, and the last
    N - K n to none. A block in which one image ends and the next begins is divided row by row.
    uniform: returns that many random numbers in [0, 1) for each draw, or for one draw that all
    share; a smaller grid takes the first ones of the numbers.
    """
    blocks = -(-grids // block)
    num_blocks = blocks.prod(1, keepdim=True)
    most = int(num_blocks.max())
    outside = torch.arange(most) >= num_blocks
    if pattern == "blocks":
        place = uniform(most).masked_fill(outside, 2.0).argsort(dim=1, stable=True)
    else:
        place = _places_from_point(uniform(3 + most), blocks, outside)
    num_cells = grids.prod(1, keepdim=True)
    cell = torch.arange(int(num_cells.max()))
    columns = grids[:, 1:]
    block_of_cell = (cell // columns // block) * blocks[:, 1:] + cell % columns // block
    block_of_cell = block_of_cell.masked_fill(cell >= num_cells, 0).expand(len(place), -1)
    place_of_cell = place.gather(1, block_of_cell).masked_fill(cell >= num_cells, most)
    order = place_of_cell.argsort(dim=1, stable=True)
    share = num_own[:, None]
    image = (cell // share.clamp_min(1)).masked_fill(cell >= num_images * share, NOBODY)
    return torch.empty_like(order).scatter_(1, order, image.expand_as(order))


def box_distance(
    point: Tensor,  # [D, 2] (y, x), in blocks from the upper left corner
    aspect: Tensor,  # [D] height over width
    columns: Tensor,  # [D, 1] or [1, 1] int64, of blocks in a grid
    count: int,
) -> Tensor:  # [D, count]
    """Compute the distance of the centres of blocks 0 to `count` - 1, row by row, from a point.

    The norm, whose balls are boxes, is max(|y| / sqrt(aspect), |x| sqrt(aspect)): the blocks nearer
    than r are those of a rectangle of area (2 r)^2 around the point, as far as it lies inside the
    grid.
    """
    root = aspect.sqrt()[:, None]
    number = torch.arange(count)
    y, x = (
        (place + 0.5 - point[:, axis, None]).abs()
        for axis, place in enumerate((number // columns, number % columns))
    )
    return torch.maximum(y / root, x * root)


def _places_from_point(
    uniform: Tensor,  # [D, 3 + b] fp32: the point, the aspect, the order of ties
    blocks: Tensor,  # [D, 2] or [1, 2] int64, rows and columns of blocks
    outside: Tensor,  # [D, b] or [1, b] bool, past the last block of a grid
) -> Tensor:  # [D, b] int64
    """Return each block's place in the order of distance from a random point, ties at random."""
    aspect = 2 ** (2 * uniform[:, 2] - 1)  # 1:2 to 2:1, evenly in its log
    distance = box_distance(blocks * uniform[:, :2], aspect, blocks[:, 1:], outside.shape[1])
    distance = distance.masked_fill(outside, torch.inf)
    shuffled = uniform[:, 3:].masked_fill(outside, 2.0).argsort(dim=1, stable=True)
    nearest = distance.gather(1, shuffled).argsort(dim=1, stable=True)
    return shuffled.gather(1, nearest).argsort(1)  # the inverse: from places to blocks and back
