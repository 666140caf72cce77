"""Patch correspondence: patches of one view are searched for in another view of the picture.

It measures whether patch features describe a place in the picture and not in the view. A code of
the position in the view alone, which every Transformer has, would find many patches of overlapping
views, so the mean over pictures at each position is subtracted first (`position_means`).

Legend: B images, N patches a view (a square grid), C feature width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.models.transformer.positions import relative_positions
from m3i_fast.ops.views import VIEW_PARAMS, draw_views, make_views, view_specs

MIN_CONTRAST = 0.05  # standard deviation of pixels in 0..1; plainer patches all look the same
RADIUS = 1.0  # patches
BOX = VIEW_PARAMS[:5]  # y, x, height, width, flip


def position_means(tokens: Iterable[Tensor]) -> Tensor:  # of [B, N, C] -> [N, C] fp64
    """Return the mean of all pictures' features at each position, over batches of both views.

    It is computed in fp64, where the mean of equal values is exactly that value: features that
    encode the position and nothing else are then exactly zero about it.
    """
    total, num = torch.zeros((), dtype=torch.float64), 0
    for batch in tokens:
        total, num = total.to(batch.device) + batch.double().sum(0), num + len(batch)
    return total / num


@dataclass(frozen=True, kw_only=True, slots=True)
class Correspondence:
    """Of each picture, how many patches of its second view the first view locates."""

    share: Tensor  # [M] fp32, NaN without a queried patch
    chance: Tensor  # [M] fp32, of features that encode nothing but the position in the view
    num_queries: Tensor  # [M] int64

    @property
    def mean_share(self) -> float:
        """Return the mean share over pictures that have queried patches; NaN where none has."""
        return float(self.share[self.num_queries > 0].mean())

    @property
    def mean_chance(self) -> float:
        """Return the mean of chance over the same pictures."""
        return float(self.chance[self.num_queries > 0].mean())


# First view and second view [B, 3, S, S] uint8, and their boxes [B, 2, 5].
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]


@torch.no_grad()
def measure_correspondence(
    embed: Callable[[Tensor], Tensor], pairs: Pairs, device: torch.device
) -> Correspondence:  # on the CPU
    """Measure patch correspondence of two crops of each picture, as `patch_correspondence` does.

    embed: views [B, 3, S, S] uint8 -> patch tokens [B, N, C]. pairs: called twice, for the means of
    the positions and for the queries, and yields the same views both times, so that memory is that
    of a batch. Its boxes are y, x, height and width in pixels of the upright picture, and flip 0 or
    1, of `two_crops` or of one's own. Raises ValueError where there are no pairs.
    """
    means = position_means(embed(view.to(device)) for *views, _ in pairs() for view in views)
    columns: list[tuple[Tensor, ...]] = []
    for *views, boxes in pairs():
        first, second = (view.to(device) for view in views)
        tokens = (embed(first), embed(second))
        measured = patch_correspondence(tokens, means, (first, second), boxes.to(device))
        columns.append(tuple(column.cpu() for column in measured))
    if not columns:
        raise ValueError("pairs: expected batches of two views and their boxes, got none")
    share, chance, num_queries = (torch.cat(column) for column in zip(*columns, strict=True))
    return Correspondence(share=share, chance=chance, num_queries=num_queries)


def two_crops(
    pictures: Sequence[Tensor],  # B x [H, W, 3] uint8, upright, on the CPU
    positions: Tensor,  # [B] int64, of each picture in the set
    *,
    size: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # 2 x [B, 3, size, size] uint8, [B, 2, 5] boxes
    """Cut two random views of at least half of each picture, changed as training changes views.

    What is cut depends on (seed, position) and the picture's size, and not on the batch.
    """
    specs = view_specs(ViewConfig(count=2, size=size, scale=(0.5, 1.0)))
    sizes = torch.tensor([picture.shape[:2] for picture in pictures])[:, None]  # [B, 1, 2]
    lengths = torch.tensor([picture.numel() for picture in pictures])
    offset = (lengths.cumsum(0) - lengths)[:, None]
    params = draw_views(sizes, positions, seed=seed, views=specs)
    pixels = torch.cat([picture.flatten() for picture in pictures])
    first, second = make_views(pixels, offset, sizes, params, views=specs)
    return first, second, params[..., : len(BOX)].contiguous()


def patch_correspondence(
    tokens: tuple[Tensor, Tensor],  # 2 x [B, N, C], patch features of two views
    means: Tensor,  # [N, C] fp64, of `position_means`
    views: tuple[Tensor, Tensor],  # 2 x [B, 3, S, S] uint8
    boxes: Tensor,  # [B, 2, 5] y, x, height, width, flip of both views
) -> tuple[Tensor, Tensor, Tensor]:  # [B] share located, [B] chance, [B] patches queried
    """Return the share of the second view's patches that the first view's patches locate.

    Queried are patches whose centre lies in the first view and whose pixels vary. A patch is
    located when the centre of the most similar one, by the cosine of their features about the means
    of their positions, is at most one patch away, down and across; equally similar ones share the
    weight. Chance is the share of the first view's patches that near, which is what features score
    that encode nothing but the position in the view. Images without such a patch give 0 queried
    patches and NaN.
    """
    grid = math.isqrt(tokens[0].shape[1])
    every = torch.arange(grid * grid, device=boxes.device).expand(len(boxes), -1)
    place = relative_positions(boxes[:, 0], boxes[:, 1], every, input_grid=grid, target_grid=grid)[
        ..., :2
    ]  # [B, N, 2] in patches of the first view
    inside = ((place > -0.5) & (place < grid - 0.5)).all(-1)
    is_query = inside & (patch_pixels(views[1], grid).std(-1) > MIN_CONTRAST)
    first, second = (F.normalize((of.double() - means).float(), dim=-1) for of in tokens)
    cosine = second @ first.mT
    best = cosine == cosine.amax(-1, keepdim=True)  # [B, N, N], the last of the first view
    cells = torch.cartesian_prod(*(torch.arange(grid, device=boxes.device),) * 2)  # [N, 2]
    near = _near(place[:, :, None], cells)  # [B, N, N]
    located = (best & near).sum(-1) / best.sum(-1)
    num_queries = is_query.sum(1)
    share, expected = (
        (hit * is_query).sum(1) / num_queries.float() for hit in (located, near.float().mean(-1))
    )
    return share, expected, num_queries


def patch_pixels(views: Tensor, grid: int) -> Tensor:
    """Return the pixels of each patch: [B, 3, S, S] uint8 -> [B, grid ** 2, 3 P P] fp32 in 0..1."""
    return F.unfold(views.float() / 255, views.shape[-1] // grid, stride=views.shape[-1] // grid).mT


def pixel_tokens(views: Tensor, grid: int) -> Tensor:
    """Return each patch's pixels minus their mean: [B, 3, S, S] uint8 -> [B, grid ** 2, 3 P P]."""
    patches = patch_pixels(views, grid)
    return patches - patches.mean(-1, keepdim=True)


def _near(place: Tensor, cell: Tensor) -> Tensor:  # [..., 2], [..., 2] -> [...] bool
    return ((place - cell).abs() <= RADIUS).all(-1)
