"""Random patterns: which cells of the token grid each image of an input shows.

Legend: D draws, K images, N cells of the grid, n <= N / K cells an image shows, r x c blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from m3i_fast.config.mixing import Pattern

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
    """Assign n = `num_own` cells of `grid`, rows and columns, to each image, by square blocks.

    The blocks of `block` x `block` cells are put in order, at random or by their distance from a
    random point; the first n cells go to the first image, the next n to the second, and the last
    N - K n to none. A block in which one image ends and the next begins is divided row by row.
    uniform: returns that many random numbers in [0, 1) for each draw.
    """
    down, across = (torch.arange(side) // block for side in grid)
    blocks = -(-grid[0] // block), -(-grid[1] // block)
    block_of_cell = (down[:, None] * blocks[1] + across).flatten()  # [N]
    if pattern == "blocks":
        place = uniform(math.prod(blocks)).argsort(dim=1, stable=True)
    else:
        place = _places_from_point(uniform(3 + math.prod(blocks)), blocks)
    order = place[:, block_of_cell].argsort(dim=1, stable=True)
    dealt = order[:, : num_images * num_own].unflatten(1, (num_images, num_own))
    return dealt.movedim(1, 0).sort(-1).values


def box_distance(
    point: Tensor,  # [D, 2] (y, x), in blocks from the upper left corner
    aspect: Tensor,  # [D] height over width
    blocks: tuple[int, int],
) -> Tensor:  # [D, r * c]
    """Compute the distance of every block's centre from a point in a norm whose balls are boxes.

    The norm is max(|y| / sqrt(aspect), |x| sqrt(aspect)): the blocks nearer than r are those of a
    rectangle of area (2 r)^2 around the point, as far as it lies inside the grid.
    """
    root = aspect.sqrt()[:, None]
    y, x = (
        (torch.arange(side) + 0.5 - point[:, axis, None]).abs() for axis, side in enumerate(blocks)
    )
    y, x = y / root, x * root  # [D, r], [D, c]
    return torch.maximum(y[:, :, None], x[:, None, :]).flatten(1)


def _places_from_point(
    uniform: Tensor,  # [D, 3 + r * c] fp32: the point, the aspect, the order of ties
    blocks: tuple[int, int],
) -> Tensor:  # [D, r * c] int64
    """Return each block's place in the order of distance from a random point, ties at random."""
    aspect = 2 ** (2 * uniform[:, 2] - 1)  # 1:2 to 2:1, evenly in its log
    distance = box_distance(torch.tensor(blocks) * uniform[:, :2], aspect, blocks)
    shuffled = uniform[:, 3:].argsort(dim=1, stable=True)
    nearest = distance.gather(1, shuffled).argsort(dim=1, stable=True)
    return shuffled.gather(1, nearest).argsort(1)  # the inverse: from places to blocks and back
