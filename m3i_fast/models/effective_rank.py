"""RankMe: how many dimensions features effectively use."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(features: Tensor) -> Tensor:  # [..., D] -> [] fp32
    """Compute the effective rank, exp(entropy of the normalised singular values), from 1 to D.

    RankMe, arXiv 2210.02885, by the eigenvalues of the D x D Gram matrix in fp64. NaN where a
    feature is not finite. Does not synchronise with the host.
    """
    rows = features.flatten(0, -2).double()
    gram = rows.T @ rows
    finite = gram.isfinite().all()  # eigvalsh raises on NaN; a check on the host would synchronise
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    singular = torch.linalg.eigvalsh(torch.where(finite, gram, identity)).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-12) + 1e-7
    rank = torch.exp(-(share * share.log()).sum())
    return torch.where(finite, rank, torch.nan).float()
