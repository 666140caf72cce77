"""Collapse monitors: is there still entropy in the targets? Read on logged steps only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_std(features: Tensor) -> Tensor:  # [..., D] -> [] fp32
    """Spread of unit-length rows: 1 when even over all dimensions, 0 when collapsed.

    Mean over dimensions of the standard deviation, times sqrt(D).
    """
    rows = F.normalize(features.float().flatten(0, -2), dim=-1)
    return rows.std(0, correction=0).mean() * rows.shape[-1] ** 0.5


def rankme(features: Tensor) -> Tensor:  # [..., D] -> [] fp32
    """Effective rank, RankMe (arXiv 2210.02885): exp of the singular values' entropy.

    From the eigenvalues of the D x D Gram matrix, in fp64; NaN where a feature is not finite.
    """
    rows = features.flatten(0, -2).double()
    gram = rows.T @ rows
    finite = gram.isfinite().all()  # eigvalsh raises on NaN, and asking first would wait for it
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    singular = torch.linalg.eigvalsh(torch.where(finite, gram, identity)).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-12) + 1e-7
    rank = torch.exp(-(share * share.log()).sum())
    return torch.where(finite, rank, torch.nan).float()


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:  # [..., D], [..., D] -> [] fp32
    """Mean cosine between matching rows (teacher and student, prediction and target)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean()
