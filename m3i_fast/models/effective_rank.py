"""How many dimensions features use."""

from __future__ import annotations

import torch
from torch import Tensor


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
