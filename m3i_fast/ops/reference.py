"""The operators in plain torch, step by step: what the kernels are tested and timed against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3i_fast.ops.mask_mix import IMAGENET_MEAN, IMAGENET_STD


def mask_mix(
    views: Tensor,  # [B, 3, H, W] uint8
    mask: Tensor,  # [P, h, w] bool
    pairs: Tensor,  # [P, 2] int64
    *,
    mean: Sequence[float] = IMAGENET_MEAN,  # [3]
    std: Sequence[float] = IMAGENET_STD,  # [3]
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:  # [P, 3, H, W] dtype
    """`m3i_fast.ops.mask_mix`, step by step; with float64 for both dtypes it is the truth."""
    height, width = views.shape[2:]
    mean_C11 = torch.tensor(mean, dtype=compute_dtype, device=views.device).view(3, 1, 1)
    std_C11 = torch.tensor(std, dtype=compute_dtype, device=views.device).view(3, 1, 1)
    views_BCHW = (views.to(compute_dtype) / 255 - mean_C11) / std_C11
    mask_PHW = mask.repeat_interleave(height // mask.shape[1], dim=1)
    mask_PHW = mask_PHW.repeat_interleave(width // mask.shape[2], dim=2)
    first_PCHW, second_PCHW = views_BCHW[pairs[:, 0]], views_BCHW[pairs[:, 1]]
    return torch.where(mask_PHW[:, None], first_PCHW, second_PCHW).to(dtype)
