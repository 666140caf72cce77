"""Are patch features about a place? Patches of one view are looked for in another view.

Legend: B images, N patches a view (a square grid), C feature width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.positions import relative_positions

MIN_CONTRAST = 0.05  # of the pixels' 0..1: what is plainer looks the same everywhere
RADIUS = 1.0  # patches


def patch_correspondence(
    tokens: tuple[Tensor, Tensor],  # 2 x [B, N, C], patch features of two views
    views: tuple[Tensor, Tensor],  # 2 x [B, 3, S, S] uint8
    boxes: Tensor,  # [B, 2, 5] y, x, height, width, flip of both views
) -> tuple[Tensor, Tensor, Tensor]:  # [B] share found, [B] chance, [B] patches asked
    """Share of the second view's patches whose most similar patch of the first is at their place.

    Asked are patches whose centre lies in the first view and whose pixels vary. A patch is found
    when the centre of the most similar one (cosine) is at most one patch away, down and across.
    Chance is the share of the first view's patches that near. Images without such a patch give 0
    patches asked and NaN.
    """
    grid = math.isqrt(tokens[0].shape[1])
    every = torch.arange(grid * grid, device=boxes.device).expand(len(boxes), -1)
    place = relative_positions(boxes[:, 0], boxes[:, 1], every, input_grid=grid, target_grid=grid)[
        ..., :2
    ]  # [B, N, 2] in patches of the first view
    inside = ((place > -0.5) & (place < grid - 0.5)).all(-1)
    asked = inside & (patch_pixels(views[1], grid).std(-1) > MIN_CONTRAST)
    cosine = F.normalize(tokens[1].float(), dim=-1) @ F.normalize(tokens[0].float(), dim=-1).mT
    best = cosine.argmax(-1)  # [B, N] patches of the first view
    found = _near(place, torch.stack([best // grid, best % grid], -1))
    cells = torch.cartesian_prod(*(torch.arange(grid, device=boxes.device),) * 2)  # [N, 2]
    chance = _near(place[:, :, None], cells).float().mean(-1)
    num_asked = asked.sum(1)
    share, expected = (
        (hit.float() * asked).sum(1) / num_asked.float() for hit in (found.float(), chance)
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
