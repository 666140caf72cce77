"""Are patch features about a place? Patches of one view are looked for in another view.

A place in the picture, not in the view: a code of the position in the view alone, which every
Transformer has, finds again many patches of views that overlap. So the mean over pictures at each
position is taken out first (`position_means`).

Legend: B images, N patches a view (a square grid), C feature width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.transformer.positions import relative_positions

MIN_CONTRAST = 0.05  # of the pixels' 0..1: what is plainer looks the same everywhere
RADIUS = 1.0  # patches


def position_means(tokens: Iterable[Tensor]) -> Tensor:  # of [B, N, C] -> [N, C] fp64
    """Mean of all pictures' features at each position of the view, over batches of both views.

    In fp64, where the mean of equal values is that value: features that are a code of the position
    and nothing else are then exactly zero about it.
    """
    total, num = torch.zeros((), dtype=torch.float64), 0
    for batch in tokens:
        total, num = total.to(batch.device) + batch.double().sum(0), num + len(batch)
    return total / num


def patch_correspondence(
    tokens: tuple[Tensor, Tensor],  # 2 x [B, N, C], patch features of two views
    means: Tensor,  # [N, C] fp64, of `position_means`
    views: tuple[Tensor, Tensor],  # 2 x [B, 3, S, S] uint8
    boxes: Tensor,  # [B, 2, 5] y, x, height, width, flip of both views
) -> tuple[Tensor, Tensor, Tensor]:  # [B] share found, [B] chance, [B] patches asked
    """Share of the second view's patches whose most similar patch of the first is at their place.

    Asked are patches whose centre lies in the first view and whose pixels vary. A patch is found
    when the centre of the most similar one, by the cosine of their features about the means of
    their positions, is at most one patch away, down and across; of several equally similar ones
    each counts a part. Chance is the share of the first view's patches that near, and what features
    get that say nothing but the position in the view. Images without such a patch give 0 patches
    asked and NaN.
    """
    grid = math.isqrt(tokens[0].shape[1])
    every = torch.arange(grid * grid, device=boxes.device).expand(len(boxes), -1)
    place = relative_positions(boxes[:, 0], boxes[:, 1], every, input_grid=grid, target_grid=grid)[
        ..., :2
    ]  # [B, N, 2] in patches of the first view
    inside = ((place > -0.5) & (place < grid - 0.5)).all(-1)
    asked = inside & (patch_pixels(views[1], grid).std(-1) > MIN_CONTRAST)
    first, second = (F.normalize((of.double() - means).float(), dim=-1) for of in tokens)
    cosine = second @ first.mT
    best = cosine == cosine.amax(-1, keepdim=True)  # [B, N, N], the last of the first view
    cells = torch.cartesian_prod(*(torch.arange(grid, device=boxes.device),) * 2)  # [N, 2]
    near = _near(place[:, :, None], cells)  # [B, N, N]
    found = (best & near).sum(-1) / best.sum(-1)
    num_asked = asked.sum(1)
    share, expected = (
        (hit * asked).sum(1) / num_asked.float() for hit in (found, near.float().mean(-1))
    )
    return share, expected, num_asked


def patch_pixels(views: Tensor, grid: int) -> Tensor:
    """[B, 3, S, S] uint8 -> [B, grid ** 2, 3 P P] fp32 in 0..1: the pixels of each patch."""
    return F.unfold(views.float() / 255, views.shape[-1] // grid, stride=views.shape[-1] // grid).mT


def pixel_tokens(views: Tensor, grid: int) -> Tensor:
    """[B, 3, S, S] uint8 -> [B, grid ** 2, 3 P P]: each patch's pixels about their mean."""
    patches = patch_pixels(views, grid)
    return patches - patches.mean(-1, keepdim=True)


def _near(place: Tensor, cell: Tensor) -> Tensor:  # [..., 2], [..., 2] -> [...] bool
    return ((place - cell).abs() <= RADIUS).all(-1)
