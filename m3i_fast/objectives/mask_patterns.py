"""Patterns: which cells of the token grid each image of an input gets, drawn at random.

Legend: D drawings, K images, N cells of the grid, n <= N / K cells an image gets, b x b blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m3i_fast.config.mixing import Pattern


def deal_cells(
    pattern: Pattern,
    *,
    num_draws: int,
    num_images: int,
    num_own: int,
    grid: int,
    block: int,
    rng: torch.Generator,
) -> Tensor:  # [K, D, n] int64, ascending
    """Deal n = `num_own` cells to each image, whole blocks of `block` x `block` cells first.

    The blocks are put in order, at random or by their distance from a random point; the first n
    cells are the first image's, the next n the second's, and the last N - K n nobody's. A block
    where one image ends and the next begins is shared row by row.
    """
    line = torch.arange(grid) // block
    num_blocks = -(-grid // block)
    block_of_cell = (line[:, None] * num_blocks + line[None, :]).flatten()  # [N]
    if pattern == "blocks":
        rank = torch.rand(num_draws, num_blocks**2, generator=rng).argsort(1)
    else:
        rank = _rank_from_point(num_draws, num_blocks, rng)
    order = rank[:, block_of_cell].argsort(dim=1, stable=True)
    dealt = order[:, : num_images * num_own].unflatten(1, (num_images, num_own))
    return dealt.movedim(1, 0).sort(-1).values


def box_distance(
    point: Tensor,  # [D, 2] (y, x), in blocks from the upper left corner
    aspect: Tensor,  # [D] height over width
    side: int,
) -> Tensor:  # [D, b * b]
    """Of every block's centre from a point, in the norm whose balls are boxes of this aspect.

    max(|y| / sqrt(aspect), |x| sqrt(aspect)): the blocks nearer than r are those of a rectangle of
    area (2 r)^2 around the point, as far as it lies inside the grid.
    """
    centre = torch.arange(side) + 0.5
    away = (centre - point[..., None]).abs()  # [D, 2, b]
    root = aspect.sqrt()[:, None]
    y, x = away[:, 0] / root, away[:, 1] * root
    return torch.maximum(y[:, :, None], x[:, None, :]).flatten(1)


def _rank_from_point(num_draws: int, side: int, rng: torch.Generator) -> Tensor:  # [D, b * b] int64
    """Each block's place among all, the nearest to a random point first, ties at random."""
    point = side * torch.rand(num_draws, 2, generator=rng)
    aspect = 2 ** (2 * torch.rand(num_draws, generator=rng) - 1)  # 1:2 to 2:1, evenly in its log
    distance = box_distance(point, aspect, side)
    shuffled = torch.rand(distance.shape, generator=rng).argsort(1)
    nearest = distance.gather(1, shuffled).argsort(dim=1, stable=True)
    return shuffled.gather(1, nearest).argsort(1)  # the inverse: from places to blocks and back
