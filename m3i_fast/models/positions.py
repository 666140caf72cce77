"""Sine-cosine embeddings of positions, and position parameters for another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_embedding(coordinates: Tensor, dim: int) -> Tensor:
    """Embed each coordinate in dim / 2 sines and cosines: [..., K] -> [..., K * dim / 2] fp32.

    Per coordinate p: sin(p w) then cos(p w), w_k = 10000 ** (-k / (dim / 4)), k < dim / 4.
    Two coordinates (row, column) give `dim` numbers, four (position and size) 2 * `dim`.
    """
    if dim % 4:
        raise ValueError(f"dim: expected a multiple of 4 for a sine-cosine position, got {dim}")
    quarter = dim // 4
    exponent = torch.arange(quarter, device=coordinates.device, dtype=torch.float32) / quarter
    angles = coordinates.float().unsqueeze(-1) * torch.pow(10000.0, -exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def grid_embedding(grid: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sine-cosine embedding of the cells of a square grid, row by row: [grid ** 2, dim] fp32."""
    side = torch.arange(grid, device=device, dtype=torch.float32)
    cells = torch.cartesian_prod(side, side)  # [grid ** 2, 2]: row, column
    return sincos_embedding(cells, dim)


def resample_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position table to another grid as timm does: [1, H W, D] -> [1, H' W', D].

    Bicubic with antialiasing, in fp32; sizes are (rows, columns).
    """
    if old == new:
        return table
    picture = table.float().unflatten(1, old).permute(0, 3, 1, 2)  # [1, D, H, W]
    picture = F.interpolate(picture, size=new, mode="bicubic", antialias=True)
    return picture.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
