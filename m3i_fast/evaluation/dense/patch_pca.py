"""Patch features as colour: the first three principal components of all tokens shown together.

Legend: B images, N patches an image, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patch_pca(
    tokens: Tensor,  # [B, N, D]
    *,
    percentile: float = 1.0,
) -> Tensor:  # [B, N, 3] fp32 in 0..1
    """Project every token on three principal components of all B * N tokens, scaled to colour.

    In each component, the `percentile` and `100 - percentile` of the projections become 0 and 1, so
    that a few outliers do not grey the rest. The sign of a component makes its largest coefficient
    positive, so that the same tokens give the same colours. Computed in fp64. Raises ValueError
    when there are fewer than three dimensions or tokens.
    """
    if tokens.dim() != 3 or tokens.shape[-1] < 3 or tokens.shape[0] * tokens.shape[1] < 3:
        raise ValueError(
            f"tokens: expected [B, N, D] with D >= 3 and B * N >= 3, got {tuple(tokens.shape)}"
        )
    rows = tokens.detach().flatten(0, 1).double()
    rows = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    components = vectors[:, -3:].flip(1)  # [D, 3], widest first
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    projected = rows @ (components * torch.where(largest < 0, -1.0, 1.0))
    edges = torch.tensor([percentile / 100, 1 - percentile / 100], dtype=torch.float64)
    low, high = torch.quantile(projected, edges, dim=0)
    colour = (projected - low) / (high - low).clamp_min(1e-12)
    return colour.clamp(0, 1).float().view(*tokens.shape[:2], 3)
