"""Self-distillation over prototypes: the teacher's targets, the student's loss, and entropy terms.

DINO (arXiv 2104.14294), iBOT (arXiv 2111.07832), DINOv2 (arXiv 2304.07193), SwAV (arXiv
2006.09882), MSN (arXiv 2204.07141). All compute in fp32 (fp64 for fp64), under autocast too.
`row_statistics` explains `process_group`; a function without it takes the rows of one rank.

Legend: N rows, K prototypes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.objectives.losses.similarity import expect_temperature
from m3i_fast.objectives.row_statistics import full_precision, mean_row, wide


@torch.no_grad()
@full_precision
def update_centre(
    centre: Tensor,  # [K] fp32 or fp64
    logits: Tensor,  # [N, K] any float, the teacher's
    *,
    momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [K] as centre
    """Return m c + (1 - m) mean_n logits_n as a new tensor, without gradient. DINO, equation 4."""
    return torch.lerp(centre, mean_row(wide(logits), process_group).to(centre.dtype), 1 - momentum)


@torch.no_grad()
@full_precision
def centred_softmax(
    logits: Tensor,  # [..., K] any float, the teacher's
    centre: Tensor,  # [K] fp32 or fp64
    *,
    temperature: float,
) -> Tensor:  # [..., K] fp32
    """Return softmax((logits - centre) / temperature), DINO's centred and sharpened targets.

    They carry no gradient. Raises ValueError for a temperature that is not positive.
    """
    expect_temperature(temperature)
    rows = wide(logits)
    return F.softmax((rows - centre.to(rows.dtype)) / temperature, dim=-1)


@torch.no_grad()
@full_precision
def sinkhorn_knopp(
    logits: Tensor,  # [N, K] any float, the teacher's
    *,
    temperature: float,
    num_iterations: int = 3,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [N, K] fp32
    """Return exp(logits / temperature), scaled until prototypes are used evenly.

    SwAV, equation 5; DINOv2 uses it for targets. An iteration divides every prototype by its sum
    over all rows, then every row by its sum, so that each row of the result sums to 1. It works on
    logarithms: no temperature or scale of the logits overflows, and none makes a prototype vanish
    (dinov2 #583). Only the largest logit of each prototype and the sums are all-reduced. Without
    gradient. Raises ValueError for a temperature that is not positive, or num_iterations below 1.
    """
    expect_temperature(temperature)
    if num_iterations < 1:
        raise ValueError(f"num_iterations: expected >= 1, got {num_iterations}")
    log_q = wide(logits) / temperature
    for _ in range(num_iterations):
        log_q = log_q - _log_sum_rows(log_q, process_group)
        log_q = log_q.log_softmax(-1)
    return log_q.exp()


def _log_sum_rows(log_q: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [N, K] -> [K]
    """Return log sum_n exp(log_q_n) over the rows of all ranks, some of which may have none."""
    if group is None:
        return log_q.logsumexp(0)
    most = torch.cat([log_q, log_q.new_full((1, log_q.shape[1]), -torch.inf)]).amax(0)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    total = (log_q - most).exp().sum(0)
    dist.all_reduce(total, group=group)
    return total.log() + most


@full_precision
def self_distillation(
    logits: Tensor,  # [N, K] any float, the student's
    targets: Tensor,  # [N, K] any float, the teacher's probabilities
    *,
    temperature: float,
    row_weights: Tensor | None = None,  # [N] any float
) -> Tensor:  # [] fp32
    """Return sum_n w_n CE_n, CE_n = -sum_k T_nk log softmax(logits_n / temperature)_k.

    DINO, equation 2, with w_n = 1 / N unless given; iBOT's weight of a masked patch is 1 / (its
    image's masked patches x images). The gradient is w (softmax sum_k T - T) / temperature, which
    also holds where targets do not sum to one. Rows are those of one rank. Raises ValueError for
    shapes that differ, or a temperature that is not positive.
    """
    if logits.dim() != 2 or targets.shape != logits.shape:
        raise ValueError(
            f"logits, targets: expected one shape [N, K], got {list(logits.shape)} and "
            f"{list(targets.shape)}"
        )
    expect_temperature(temperature)
    rows = wide(logits) / temperature
    nll = F.cross_entropy(rows, targets.to(rows.dtype), reduction="none")
    return nll.mean() if row_weights is None else (row_weights.to(nll.dtype) * nll).sum()


@full_precision
def mean_entropy(
    logits: Tensor,  # [N, K] any float
    *,
    temperature: float,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return log K - H(mean_n softmax(logits_n / temperature)) >= 0, MSN's me-max; 0 when even.

    It is the Kullback-Leibler divergence of the mean assignment from the uniform one. Raises
    ValueError for logits that are no matrix, or a temperature that is not positive.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits: expected shape [N, K], got {list(logits.shape)}")
    expect_temperature(temperature)
    share_K = mean_row(F.softmax(wide(logits) / temperature, dim=-1), process_group)
    # A prototype that nobody chose: 0 log 0 = 0, and its gradient is finite.
    log_share = share_K.clamp_min(torch.finfo(share_K.dtype).tiny).log()
    return math.log(logits.shape[1]) + (share_K * log_share).sum()
