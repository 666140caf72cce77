"""Target encoders whose output the predictors must find: the EMA image encoder."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.ops import mask_mix


def normalise_views(views: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Chosen rows, normalised in one pass: [B, 3, H, W] uint8, [R] -> [R, 3, H, W] `dtype`."""
    whole = torch.ones(rows.shape[0], 1, 1, dtype=torch.bool, device=views.device)
    return mask_mix(views, whole, torch.stack([rows, rows], 1), dtype=dtype)


def normalise_tokens(tokens: Tensor) -> Tensor:  # [..., C] -> [..., C] fp32
    """The targets as `ops.gaussian` normalises them on its way: layer-norm without affine."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


class MomentumEncoder(nn.Module):
    """EMA copy of the image encoder (paper, figure 1; SiameseIM).

    Its patch tokens, without gradient; the likelihood normalises them.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Stay in evaluation mode: targets see no stochastic depth."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, N, C]
        return self.encoder.encode_cells(images)
