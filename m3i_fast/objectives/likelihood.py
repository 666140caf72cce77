"""The Gaussian likelihood of M3I (arXiv 2211.09807, section 3).

A variational posterior P(z | z_hat). Legend: N pictures, Q cells, D feature width.
Returns a scalar in fp32 (fp64 for fp64 input); lower is more mutual information.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian(
    z_hat: Tensor,  # [N, Q, D] any float
    z: Tensor,  # [N, Q, D] any float, no gradient needed
    *,
    sigma: float = 1.0,
) -> Tensor:  # [] fp32
    """-log N(z; z_hat, sigma^2 I) a dimension, without its constant.

    mean of (z - z_hat)^2 / (2 sigma^2), the L2-norm of the paper's figure 1. Accumulates in fp32.
    Raises ValueError when the shapes differ or sigma is not positive.
    """
    if z_hat.shape != z.shape:
        raise ValueError(
            f"z: expected the shape of z_hat {tuple(z_hat.shape)}, got {tuple(z.shape)}"
        )
    if not sigma > 0:
        raise ValueError(f"sigma: expected > 0, got {sigma}")
    return (_wide(z_hat) - _wide(z)).square().mean() / (2 * sigma**2)


def decorrelation(
    z_hat: Tensor,  # [N, Q, D] any float
    z: Tensor,  # [N, Q, D] any float, detached
) -> Tensor:  # [] fp32
    """SiameseIM's entropy regulariser: mean_n z_hat_n^T C z_hat_n / D with C = mean_n z_n z_n^T.

    Written as ((P C) * P).sum(-1), which never builds the [NQ, NQ] matrix.
    """
    pred_RD = _wide(z_hat).flatten(0, -2)
    target_RD = _wide(z).flatten(0, -2)
    covariance_DD = target_RD.T @ target_RD / target_RD.shape[0]
    return ((pred_RD @ covariance_DD) * pred_RD).sum(-1).mean() / pred_RD.shape[-1]


def _wide(x: Tensor) -> Tensor:
    """fp32 for anything narrower; fp64 stays, so that gradients can be checked."""
    return x if x.dtype == torch.float64 else x.float()
