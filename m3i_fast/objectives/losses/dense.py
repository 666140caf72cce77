"""Losses of single cells, of pictures that may have unequal numbers of them.

Legend: R rows, D features.
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.objectives.row_statistics import sum_over_ranks, wide
from m3i_fast.ops import gaussian


def gaussian_of_rows(
    z_hat: Tensor,  # [..., D]
    z: Tensor,  # [..., D], detached
    *,
    shares: Tensor | None = None,  # [R], sums to 1
    rank_weight: float = 1.0,
    normalise: bool = False,
    decorrelation_weight: float = 0.0,
    centred: bool = False,
    process_group: dist.ProcessGroup | None = None,
    sigma: float = 1.0,
) -> Tensor:  # [] fp32
    """Return `ops.gaussian` as a weighted mean over rows, the second moment of targets likewise.

    shares: what each row counts for; None for as much each. rank_weight: what this rank's mean
    counts for in that of all ranks, 1 on average; it matters for the decorrelation alone. Rows that
    count unequally are scaled by the root of their weight, of which both terms are squares.
    """
    reads_ranks = process_group is not None and decorrelation_weight != 0
    rank_weight = rank_weight if reads_ranks else 1.0
    fit = partial(
        gaussian,
        sigma=sigma,
        decorrelation_weight=decorrelation_weight,
        process_group=process_group,
    )
    if shares is None and rank_weight == 1.0:
        return fit(z_hat, z, normalise=normalise, centred=centred)
    z_hat, z = wide(z_hat).flatten(0, -2), wide(z).flatten(0, -2)
    if normalise:
        z = F.layer_norm(z, z.shape[-1:])
    if shares is None:
        shares = z.new_full((len(z),), 1 / len(z))
    shares = rank_weight * shares[:, None]
    root = (len(z) * shares).sqrt()
    value = fit(root * z_hat, root * z)
    if centred and decorrelation_weight:
        mean = sum_over_ranks((shares * z).sum(0), process_group)
        if process_group is not None:
            mean = mean / dist.get_world_size(process_group)
        along = (z_hat @ mean).square()
        value = value - decorrelation_weight / z.shape[-1] * (shares[:, 0] * along).sum()
    return value / rank_weight
