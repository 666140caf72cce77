"""Regularisers that keep targets from collapsing, for the entropy H(p(z)) of M3I, section 3.

They are pure functions of a batch of embeddings; lower is more entropy unless the first line says
otherwise. Each returns a scalar in fp32 (fp64 for fp64) and computes in it, under autocast too, and
raises ValueError for tensors whose shapes are not those of its signature.
`row_statistics` explains `process_group`; a function without it takes the rows of one rank.

Legend: N rows, D features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.objectives.row_statistics import (
    full_precision,
    mean_row,
    num_rows,
    outer_mean,
    quadratic_form,
    wide,
)


def _expect_rows(name: str, z: Tensor) -> None:
    if z.dim() != 2:
        raise ValueError(f"{name}: expected shape [N, D], got {list(z.shape)}")


def _expect_pair(z_a: Tensor, z_b: Tensor) -> None:
    _expect_rows("z_a", z_a)
    if z_b.shape != z_a.shape:
        raise ValueError(f"z_b: expected shape {list(z_a.shape)} as z_a, got {list(z_b.shape)}")


def _expect_spread(z: Tensor, process_group: dist.ProcessGroup | None) -> None:
    _expect_rows("z", z)
    if process_group is None and z.shape[0] < 2:
        raise ValueError(f"z: expected at least 2 rows, got {z.shape[0]}")


def _off_diagonal_square(matrix: Tensor) -> Tensor:  # [D, D] -> []
    return (matrix - matrix.diagonal().diag_embed()).square().sum()


# ---- Cross-correlation and covariance ------------------------------------------------------------


@full_precision
def barlow_twins(
    z_a: Tensor,  # [N, D] any float
    z_b: Tensor,  # [N, D] any float
    *,
    off_diagonal_weight: float = 5e-3,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return sum_i (1 - C_ii)^2 + w sum_{i != j} C_ij^2.

    Barlow Twins, arXiv 2103.03230, equation 1. C = mean_n a_n b_n^T is the [D, D]
    cross-correlation of both views, of features standardised over all rows as the authors' code
    does it: batch norm without affine, variance over N plus `eps`.
    """
    _expect_pair(z_a, z_b)
    a, b = (_standardised(wide(z), eps, process_group) for z in (z_a, z_b))
    correlation_DD = outer_mean(a, b, process_group)
    on_diagonal = (correlation_DD.diagonal() - 1).square().sum()
    return on_diagonal + off_diagonal_weight * _off_diagonal_square(correlation_DD)


def _standardised(rows: Tensor, eps: float, process_group: dist.ProcessGroup | None) -> Tensor:
    centred = rows - mean_row(rows, process_group)
    return centred * (mean_row(centred.square(), process_group) + eps).rsqrt()


@full_precision
def invariance(
    z_a: Tensor,  # [N, D] any float
    z_b: Tensor,  # [N, D] any float
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return mean_n |a_n - b_n|^2 / D, VICReg's invariance term as its authors' code divides it.

    arXiv 2105.04906, equation 5. It equals `ops.gaussian` with sigma^2 = 1/2.
    """
    _expect_pair(z_a, z_b)
    return mean_row((wide(z_a) - wide(z_b)).square(), process_group).mean()


@full_precision
def variance_hinge(
    z: Tensor,  # [N, D] any float
    *,
    std: float = 1.0,
    eps: float = 1e-4,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return mean_d max(0, std - sqrt(var(z_d) + eps)), with the variance over N - 1.

    VICReg, arXiv 2105.04906, equations 1 and 2. Raises ValueError for fewer than two rows; with a
    process group it is NaN where all ranks together have fewer.
    """
    _expect_spread(z, process_group)
    rows = wide(z)
    count = num_rows(rows, process_group)
    centred = rows - mean_row(rows, process_group)
    variance = mean_row(centred.square(), process_group) * (count / (count - 1))
    return F.relu(std - (variance + eps).sqrt()).mean()


@full_precision
def covariance(
    z: Tensor,  # [N, D] any float
    *,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return sum_{i != j} Cov_ij^2 / D of the [D, D] covariance over N - 1.

    VICReg, arXiv 2105.04906, equations 3 and 4. Fewer than two rows are an error or NaN as in
    `variance_hinge`.
    """
    _expect_spread(z, process_group)
    rows = wide(z)
    count = num_rows(rows, process_group)
    centred = rows - mean_row(rows, process_group)
    covariance_DD = outer_mean(centred, centred, process_group) * (count / (count - 1))
    return _off_diagonal_square(covariance_DD) / rows.shape[1]


def vicreg(
    z_a: Tensor,  # [N, D] any float
    z_b: Tensor,  # [N, D] any float
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    eps: float = 1e-4,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return w_i invariance + w_v mean of both variance hinges + w_c sum of both covariances.

    VICReg, arXiv 2105.04906, equation 6; the mean over the two hinges is the authors' code's, the
    paper's equation has their sum.
    """
    group = process_group
    of_pair = invariance_weight * invariance(z_a, z_b, process_group=group)
    for z in (z_a, z_b):
        hinge = variance_hinge(z, eps=eps, process_group=group)
        of_pair = of_pair + variance_weight / 2 * hinge
        of_pair = of_pair + covariance_weight * covariance(z, process_group=group)
    return of_pair


# ---- A running correlation matrix ----------------------------------------------------------------


@torch.no_grad()
@full_precision
def update_correlation(
    correlation: Tensor,  # [D, D] fp32 or fp64
    z_a: Tensor,  # [N, D] any float
    z_b: Tensor,  # [N, D] any float
    *,
    momentum: float = 0.99,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [D, D] as correlation
    """Return rho F + (1 - rho) mean of both views' z z^T, UniGrad's running correlation.

    arXiv 2112.05141; the views are those of the momentum encoder. The result is a new tensor
    without gradient.
    """
    _expect_pair(z_a, z_b)
    a, b = (wide(z).to(correlation.dtype) for z in (z_a, z_b))
    of_batch = (outer_mean(a, a, process_group) + outer_mean(b, b, process_group)) / 2
    return torch.lerp(correlation, of_batch, 1 - momentum)


@full_precision
def unigrad(
    z: Tensor,  # [N, D] any float, unit rows
    z_momentum: Tensor,  # [N, D] any float, unit rows of the other view; no gradient goes there
    correlation: Tensor,  # [D, D] fp32 or fp64
    *,
    decorrelation_weight: float = 100.0,
) -> Tensor:  # [] fp32
    """Return mean_n (-z_n . z'_n + w/2 z_n^T F z_n), whose gradient is (w F z_n - z'_n) / N.

    UniGrad, arXiv 2112.05141, with F of `update_correlation`. Its authors train on
    z . sg(w F z - z'), which has the same gradient and twice the quadratic term in its value. For
    both views take the mean of two calls. Rows are those of one rank.
    """
    _expect_pair(z, z_momentum)
    rows = wide(z)
    attraction = (rows * wide(z_momentum).detach()).sum(-1)
    spread = quadratic_form(rows, correlation.detach().to(rows.dtype))
    return (decorrelation_weight / 2 * spread - attraction).mean()


# ---- Volume and distances ------------------------------------------------------------------------


@full_precision
def coding_rate(
    z: Tensor,  # [N, D] any float
    *,
    eps: float = 0.2,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return 1/2 log det(I + D / (N eps) Z^T Z), to be maximised: the loss is its negative.

    It is the total coding rate of EMP-SSL (arXiv 2304.03977; eps not squared, as in its authors'
    code) and SimDINO (arXiv 2502.10385), computed by Cholesky without a host synchronisation. NaN
    where an input is not finite.
    """
    _expect_rows("z", z)
    rows = wide(z)
    dim = rows.shape[1]
    scatter_DD = outer_mean(rows, rows, process_group) * (dim / eps)
    identity = torch.eye(dim, dtype=rows.dtype, device=rows.device)
    factor, failure = torch.linalg.cholesky_ex(identity + scatter_DD)
    return torch.where(failure == 0, factor.diagonal().log().sum(), torch.nan)


@full_precision
def koleo(z: Tensor, *, eps: float = 1e-8) -> Tensor:  # [N, D] any float -> [] fp32
    """Return -mean_n log |u_n - nearest other u|, u = z / |z|: Kozachenko-Leonenko's entropy term.

    arXiv 1806.03198, as in DINOv2. A distance below `eps` counts as eps and gives no gradient, so
    that duplicates are finite in both; fewer than two rows give 0. Rows are those of one rank, as
    in DINOv2: over more of them neighbours are nearer. Memory is that of the [N, N] products.
    """
    _expect_rows("z", z)
    rows = F.normalize(wide(z), dim=-1, eps=1e-8)
    if rows.shape[0] < 2:
        return rows.sum() * 0
    with torch.no_grad():
        nearest = (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(1)
    square = (rows - rows[nearest]).square().sum(-1)
    return -square.clamp_min(eps**2).log().mean() / 2
