"""Positions of patches: sine-cosine and rotary embeddings, resampling, and relative positions.

Legend: I images, Q target patches, B batch, T tokens, H heads, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.encoder import PackedCells
from m3i_fast.models.transformer.packing import to_device


def sincos_frequencies(dim: int, device: torch.device | None = None) -> Tensor:  # [dim / 4] fp32
    """Return the frequencies w of `sincos_embedding`."""
    quarter = dim // 4
    exponent = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    return torch.pow(10000.0, -exponent)


def sincos_embedding(coordinates: Tensor, dim: int, frequencies: Tensor | None = None) -> Tensor:
    """Embed each coordinate in dim / 2 sines and cosines: [..., K] -> [..., K * dim / 2] fp32.

    Per coordinate p: sin(p w) then cos(p w), w_k = 10000 ** (-k / (dim / 4)), k < dim / 4.
    Two coordinates (row, column) give `dim` numbers, four (position and size) 2 * `dim`.
    frequencies: those of `sincos_frequencies`, where they are kept. Raises ValueError where `dim`
    is no multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4 for a sine-cosine position, got {dim}")
    if frequencies is None:
        frequencies = sincos_frequencies(dim, coordinates.device)
    angles = coordinates.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def grid_embedding(grid: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Embed the cells of a square grid, row by row, in sines and cosines: [grid ** 2, dim] fp32."""
    side = torch.arange(grid, device=device, dtype=torch.float32)
    cells = torch.cartesian_prod(side, side)  # [grid ** 2, 2]: row, column
    return sincos_embedding(cells, dim)


ROTARY_BASE = 100.0  # as DINOv3


def patch_centres(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return the centres of a view's patches, row by row: [rows * columns, 2] fp32.

    Each is (row, column) in (-1, 1), whatever the size of the view in pixels.
    """
    sides = [
        (torch.arange(count, device=device, dtype=torch.float32) + 0.5) / count * 2 - 1
        for count in (rows, columns)
    ]
    return torch.cartesian_prod(*sides)


def rotary(centres: Tensor, head_dim: int) -> Tensor:
    """Compute the cosines and sines that `rotate` takes: [..., 2] -> [..., 2, head_dim / 2] fp32.

    Angles are 2 pi p / 100 ** (4 k / head_dim), k < head_dim / 4, of rows and then of columns
    (DINOv3, arXiv 2508.10104); the centre (0, 0) has the angle 0.
    """
    exponent = torch.arange(head_dim // 4, device=centres.device, dtype=torch.float32)
    frequency = 2 * math.pi * torch.pow(ROTARY_BASE, -4 * exponent / head_dim)
    angles = (centres.float().unsqueeze(-1) * frequency).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()], dim=-2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate queries or keys by the angles of their tokens: [B, T, H, D], [B, T, 2, D / 2] -> x's.

    Feature k of the first half of a head is paired with feature k of the second half. Computed in
    fp32 and returned in the dtype of x.
    """
    cos, sin = rotation.unsqueeze(2).unbind(-2)  # [B, T, 1, D / 2]
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, in fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resample_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table to another grid, as timm does: [1, H W, D] -> [1, H' W', D].

    Bicubic with antialiasing, in fp32 (in fp64 where the table is), returned in the dtype of the
    table. old, new: (rows, columns).
    """
    if old == new:
        return table
    picture = at_least_fp32(table).unflatten(1, old).permute(0, 3, 1, 2)  # [1, D, H, W]
    picture = F.interpolate(picture, size=new, mode="bicubic", antialias=True)
    return picture.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


# ---- Grids of any rows and columns, one behind the other -----------------------------------------


def cells_of_grids(grids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of every cell, and the extent of its grid, grid after grid, row by row.

    grids: [N, 2] int64, rows and columns of each. Returns two [T, 2] int64, (row, column) and
    (rows, columns) of each of the T cells.
    """
    count = grids.prod(1)
    extent = grids.repeat_interleave(count, 0)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    cell = torch.arange(len(extent), device=grids.device) - first
    return torch.stack([cell // extent[:, 1], cell % extent[:, 1]], 1), extent


def whole_pictures(grids: Tensor, device: torch.device) -> PackedCells:  # [N, 2] on the CPU
    """Return all cells of pictures of these rows and columns, each a sequence, for a device."""
    place, extent = (to_device(each, device) for each in cells_of_grids(grids))
    return PackedCells(grids.prod(1).tolist(), place, extent, int(grids.max()))


def grid_centres(place: Tensor, extent: Tensor) -> Tensor:
    """Return the centres of cells as `patch_centres` does: [T, 2] int64, [T, 2] -> [T, 2] fp32."""
    return (place.float() + 0.5) / extent * 2 - 1


def resample_to_grids(
    table: Tensor,  # [1, G G, D]
    old: int,
    place: Tensor,  # [T, 2] int64
    extent: Tensor,  # [T, 2] int64
    largest: int,
) -> Tensor:  # [T, D]
    """Resample a square position table to each cell's own grid, as `resample_grid` does.

    A cell's position is a sum of the table's with weights that are a product of those of its row
    and of its column, so that all grids are one matrix product. old: cells G along a side of the
    table. place, extent: as `cells_of_grids` returns. largest: the most rows or columns.
    """
    table = table[0]
    wide = at_least_fp32(table)
    weights = _side_weights(old, 1 << (largest - 1).bit_length(), wide.dtype, wide.device)
    side = extent * (extent - 1) // 2 + place  # the rows of sides of 1, 2, ... are stacked
    rows, columns = weights[side].unbind(1)  # [T, G] each
    of_cells = (rows[:, :, None] * columns[:, None, :]).flatten(1)  # [T, G G]
    with torch.autocast(table.device.type, enabled=False):
        return (of_cells @ wide).to(table.dtype)


@lru_cache(maxsize=16)
def _side_weights(old: int, largest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the weights by which `resample_grid` resizes a side to 1, 2, ... `largest` cells.

    [1 + 2 + ... + largest, old]: n rows for n cells, each the weights of the old cells.
    """
    unit = torch.eye(old, dtype=dtype).view(1, old, 1, old)  # channel k is 1 in column k
    sides = [
        unit if new == old else F.interpolate(unit, (1, new), mode="bicubic", antialias=True)
        for new in range(1, largest + 1)
    ]
    return to_device(torch.cat([side[0, :, 0].t() for side in sides]), device)


# ---- Views of one picture ------------------------------------------------------------------------


def relative_positions(
    input_boxes: Tensor,  # [I, 5] y, x, height, width in pixels of the upright image, flip 0 or 1
    target_boxes: Tensor,  # [I, 5] the same image's target view
    target_index: Tensor,  # [I, Q] int64 patches of the target view, row by row
    *,
    input_grid: int,
    target_grid: int,
) -> Tensor:
    """Compute where target patches lie in the input view (SiameseIM's geometry): [I, Q, 4] fp32.

    A view is its box resized to a square, then mirrored if flip = 1. The four values are py, px,
    ln(dh) and ln(dw): centre and size of the target patch in patches of the input view, whose own
    patch (u, v) has centre (u, v) and size (1, 1); positions outside the view are below -0.5 or
    above input_grid - 0.5. With an input box (y, x, h, w), a target box (y', x', h', w') and a
    target patch's centre at the fractions r and c of the target view before its mirroring:

        py = input_grid * (y' - y + h' r) / h - 0.5
        px = input_grid * q - 0.5,  q = (x' - x + w' c) / w, or 1 - q if the input is mirrored
        dh = (h' / target_grid) / (h / input_grid),  dw likewise

    Raises ValueError for boxes of another shape.
    """
    for name, boxes in (("input_boxes", input_boxes), ("target_boxes", target_boxes)):
        if boxes.shape != (target_index.shape[0], 5):
            raise ValueError(
                f"{name}: expected [{target_index.shape[0]}, 5], got {list(boxes.shape)}"
            )
    fraction, ratio = relative_fractions(
        input_boxes, target_boxes, target_index, target_grid=target_grid
    )
    return grid_positions(fraction, ratio, input_grid=input_grid, target_grid=target_grid)


def relative_fractions(
    input_boxes: Tensor,  # [..., I, 5] as `relative_positions`
    target_boxes: Tensor,  # [..., I, 5]
    target_index: Tensor,  # [I, Q] int64
    *,
    target_grid: int,
) -> tuple[Tensor, Tensor]:  # [..., I, Q, 2], [..., I, 1, 2] fp32
    """Compute target patches' centres in fractions of the input view, and h' / h and w' / w."""
    cell = torch.stack([target_index // target_grid, target_index % target_grid], -1)
    centre = (cell + 0.5) / target_grid
    return fractions_of_centres(input_boxes.unsqueeze(-2), target_boxes.unsqueeze(-2), centre)


def fractions_of_centres(
    input_boxes: Tensor,  # [..., 5] as `relative_positions`
    target_boxes: Tensor,  # [..., 5]
    centre: Tensor,  # [..., 2] in fractions of the target view, before its mirroring
) -> tuple[Tensor, Tensor]:  # [..., 2] each, fp32
    """Compute points of target views in fractions of the input views, and h' / h and w' / w."""
    boxes, targets = input_boxes.float(), target_boxes.float()
    axis = torch.arange(2, device=boxes.device, dtype=boxes.dtype)  # a mirror keeps y and turns x
    turned, target_turned = boxes[..., 4:] * axis, targets[..., 4:] * axis
    centre = (target_turned - centre).abs()  # 1 - c where the target is turned
    size, target_size = boxes[..., 2:4], targets[..., 2:4]
    fraction = (targets[..., :2] - boxes[..., :2] + target_size * centre) / size
    return turned + (1 - 2 * turned) * fraction, target_size / size


def grid_positions(
    fraction: Tensor,  # [..., I, Q, 2]
    ratio: Tensor,  # [..., I, 1, 2]
    *,
    input_grid: int | Tensor,
    target_grid: int | Tensor,
) -> Tensor:  # [..., I, Q, 4]
    """Return the positions of `relative_positions` of what `relative_fractions` computes.

    input_grid, target_grid: cells along both sides, or rows and columns: [..., 2].
    """
    scale = input_grid / target_grid
    scale = scale.to(ratio.dtype) if isinstance(scale, Tensor) else scale
    log_size = (ratio * scale).log().expand_as(fraction)
    return torch.cat([fraction * input_grid - 0.5, log_size], -1)
