"""Scenes of four drawings on one canvas, with the category that each patch shows.

Legend: K drawings, S scenes, H side of the canvas, N patches of a scene (a square grid).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -1
MIN_SIDE = 3 / 8  # of the canvas; at most 1 / 2, the side of a quarter
MAX_PAPER = 16  # levels below white that are still paper: resampling rings
MIN_INK = 0.25  # of a patch's pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """Pictures of four drawings each; patches with next to no ink have label and group IGNORED."""

    views: Tensor  # [S, 3, H, H] uint8
    label: Tensor  # [S, N] int64, category of the drawing that covers most of the patch
    group: Tensor  # [S, N] int64, its concept
    place: Tensor  # [S, N] int64, 0 to 3: which of the four it is


def compose_scenes(
    drawings: Tensor,  # [K, 3, H, H] uint8 on white
    label: Tensor,  # [K] int64
    group: Tensor,  # [K] int64
    *,
    num_scenes: int,
    grid: int,
    seed: int = 0,
) -> Scenes:
    """Compose scenes of four drawings, one in each quarter, of random size and offset.

    A round goes through all drawings in random order, except for up to three where four does not
    divide their number, so that all are used about equally; the last round ends at `num_scenes`. A
    seed gives the same scenes. The label of a patch is that of the drawing with most ink in it,
    where ink is what is not white. A patch with ink on less than MIN_INK of its pixels is ignored
    instead of being a class "background": any features, trained or not, tell paper from ink, so
    that class would raise the mean over classes for all of them. Raises ValueError when there are
    fewer than four drawings or `grid` does not divide H.
    """
    if len(drawings) < 4:
        raise ValueError(f"drawings: expected at least 4, got {len(drawings)}")
    side = drawings.shape[-1]
    if side % grid:
        raise ValueError(f"grid: expected a divisor of {side} (the canvas), got {grid}")
    rng = torch.Generator().manual_seed(seed)
    rounds = -(-num_scenes // (len(drawings) // 4))
    used = torch.cat([_round_of_four(len(drawings), rng) for _ in range(rounds)])[:num_scenes]
    views = torch.full((num_scenes, 3, side, side), 255, dtype=torch.uint8)
    ink = torch.empty(num_scenes, 4, grid * grid)
    for quarter in range(4):
        corner = torch.tensor([quarter // 2, quarter % 2]) * (side // 2)
        alone = _scatter(drawings[used[:, quarter]], corner, rng)
        views = torch.minimum(views, alone)  # quarters do not overlap: elsewhere it is white
        inked = (alone < 255 - MAX_PAPER).any(1, keepdim=True).float()
        ink[:, quarter] = F.avg_pool2d(inked, side // grid).flatten(1)
    most, place = ink.max(1)
    bare = most < MIN_INK
    return Scenes(
        views=views,
        label=label[used].gather(1, place).masked_fill(bare, IGNORED),
        group=group[used].gather(1, place).masked_fill(bare, IGNORED),
        place=place,
    )


def thin_out(scenes: Scenes, per_drawing: int, *, seed: int = 0) -> Tensor:  # [S, N] bool
    """Choose at most `per_drawing` random patches a drawing, since neighbours are alike."""
    priority = torch.rand(scenes.label.shape, generator=torch.Generator().manual_seed(seed))
    priority = priority.masked_fill(scenes.label == IGNORED, 2.0)
    kept = torch.zeros_like(scenes.label, dtype=torch.bool)
    for quarter in range(4):
        own = priority.masked_fill(scenes.place != quarter, 2.0)
        chosen = own.argsort(1)[:, :per_drawing]
        kept.scatter_(1, chosen, kept.gather(1, chosen) | (own.gather(1, chosen) < 1))
    return kept


def _round_of_four(num: int, rng: torch.Generator) -> Tensor:  # -> [num // 4, 4]
    return torch.randperm(num, generator=rng)[: num // 4 * 4].view(-1, 4)


def _scatter(
    drawings: Tensor,  # [S, 3, H, H] uint8
    corner: Tensor,  # [2] y, x of the quarter
    rng: torch.Generator,
) -> Tensor:  # [S, 3, H, H] uint8, each shrunk and put somewhere in the quarter, on white
    canvas = torch.full_like(drawings, 255)
    half = drawings.shape[-1] // 2
    sides = torch.randint(round(2 * half * MIN_SIDE), half + 1, (len(drawings),), generator=rng)
    offset = torch.rand(len(drawings), 2, generator=rng)
    top_left = corner + (offset * (half - sides + 1)[:, None]).long()
    for side in sides.unique().tolist():
        rows = (sides == side).nonzero()[:, 0]
        small = F.interpolate(
            drawings[rows].float(), size=(side, side), mode="bilinear", antialias=True
        )
        small = small.round().clamp(0, 255).to(torch.uint8)
        for row, picture in zip(rows.tolist(), small, strict=True):
            y, x = top_left[row].tolist()
            canvas[row, :, y : y + side, x : x + side] = picture
    return canvas
