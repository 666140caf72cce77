"""Losses of annotations that are no embeddings: sets of labels, and numbers.

Each is a mean over the rows that have the annotation, of all ranks of a process group, of a loss of
each row alone (`row_statistics` says what that means for gradients). Legend: N rows, L labels, K
numbers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.objectives.row_statistics import full_precision, sum_over_ranks, wide


@full_precision
def binary_cross_entropy(
    z_hat: Tensor,  # [N, L] any float, logits
    z: Tensor,  # [N, L] 0 or 1
    *,
    members: Tensor,  # [N] bool
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return the mean over members and labels of log(1 + exp(-y z_hat)), y = 2 z - 1.

    `F.binary_cross_entropy_with_logits` of the rows whose labels are known; 0 without any.
    """
    logits = wide(z_hat)
    each = F.binary_cross_entropy_with_logits(logits, z.to(logits.dtype), reduction="none")
    return member_mean(each.mean(1), members, process_group)


@full_precision
def known_squares(
    z_hat: Tensor,  # [N, K] any float
    z: Tensor,  # [N, K] any float, NaN where it is not known
    *,
    sigma: float,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return the mean of (z_hat - z)^2 / (2 sigma^2) over each row's known numbers, then over rows.

    Rows of which no number is known are left out; 0 without any other. No gradient reaches a
    prediction of an unknown number.
    """
    prediction, target = wide(z_hat), wide(z)
    known = ~target.isnan()
    distance = torch.where(known, prediction - target.masked_fill(~known, 0), 0)
    count = known.sum(1)
    each = distance.square().sum(1) / (2 * sigma**2 * count.clamp_min(1))
    return member_mean(each, count > 0, process_group)


def member_mean(
    values: Tensor,  # [N] fp32 or fp64
    members: Tensor,  # [N] bool
    process_group: dist.ProcessGroup | None,
) -> Tensor:  # []
    """Average the members of all ranks' rows; 0 without any. Values of others are not read."""
    total = sum_over_ranks(torch.where(members, values, 0).sum(), process_group)
    count = sum_over_ranks(members.sum().to(values.dtype), process_group)
    return total / count.clamp_min(1)
