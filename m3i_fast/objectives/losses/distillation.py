"""Self-distillation over prototypes: the teacher's targets, the student's loss, and entropy terms.

DINO (arXiv 2104.14294), iBOT (arXiv 2111.07832), DINOv2 (arXiv 2304.07193), SwAV (arXiv
2006.09882), MSN (arXiv 2204.07141). Logits are products of features and prototypes; no function
stores an [N, K] array of them. Sums are in fp32 (fp64 for fp64). `row_statistics` explains
`process_group`; a function without it takes the rows of one rank.

Legend: N rows, E features, K prototypes, R rows of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3i_fast.objectives.losses.similarity import expect_temperature
from m3i_fast.objectives.row_statistics import (
    full_precision,
    mean_row,
    num_rows,
    sum_over_ranks,
    wide,
)
from m3i_fast.ops import SoftTargets, boltzmann


@torch.no_grad()
@full_precision
def update_centre(
    centre: Tensor,  # [K] fp32 or fp64
    features: Tensor,  # [N, E] any float, the teacher's
    prototypes: Tensor,  # [K, E] any float, the teacher's
    *,
    momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [K] as centre
    """Return m c + (1 - m) mean_n logits_n as a new tensor, without gradient. DINO, equation 4.

    The mean of the logits is the product of the prototypes with the mean of the features.
    """
    mean_K = wide(prototypes) @ mean_row(wide(features), process_group)
    return torch.lerp(centre, mean_K.to(centre.dtype), 1 - momentum)


def self_distillation(
    features: Tensor,  # [N, E] fp32, fp64, fp16 or bf16, the student's
    prototypes: Tensor,  # [K, E] as features
    targets: SoftTargets,  # of N rows and K columns
    *,
    temperature: float,
) -> Tensor:  # [] fp32
    """Return mean_n CE_n, CE_n = -sum_k T_nk log softmax(features_n . prototypes / temperature)_k.

    DINO, equation 2. A weighted mean where the targets have row weights; iBOT's of a masked patch
    is 1 / (its image's masked patches x images). Rows are those of one rank. Under autocast
    products are of features in its dtype, with sums in fp32. Raises ValueError for a temperature
    that is not positive, and as `ops.boltzmann`.
    """
    return boltzmann(
        features, prototypes, inverse_temperature(temperature, features), targets=targets
    )


def inverse_temperature(temperature: float, like: Tensor) -> Tensor:  # []
    """Return 1 / temperature as `ops.boltzmann` takes it, on the device of `like`.

    Raises ValueError for a temperature that is not positive.
    """
    expect_temperature(temperature)
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full((), 1 / temperature, dtype=dtype, device=like.device)


class _SumOfSoftmaxes(torch.autograd.Function):
    """sum_n softmax(scale features_n . prototypes), whose backward computes the rows once more."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,  # [N, E]
        prototypes: Tensor,  # [K, E]
        scale: Tensor,  # []
    ) -> Tensor:  # [K]
        ctx.save_for_backward(features, prototypes, scale)
        total_K = prototypes.new_zeros(len(prototypes))
        for _, share_RK in SoftTargets(features, prototypes, scale).blocks():
            total_K += share_RK.sum(0)
        return total_K

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, Tensor, None]:
        features, prototypes, scale = ctx.saved_tensors
        grad_features, grad_prototypes = torch.empty_like(features), torch.zeros_like(prototypes)
        for rows, share_RK in SoftTargets(features, prototypes, scale).blocks():
            along_R1 = (share_RK @ grad_K)[:, None]
            logits_grad = share_RK.mul_(grad_K - along_R1)
            torch.mm(logits_grad, prototypes, out=grad_features[rows])
            torch.addmm(grad_prototypes, logits_grad.T, features[rows], out=grad_prototypes)
        return grad_features.mul_(scale), grad_prototypes.mul_(scale), None


@full_precision
def mean_entropy(
    features: Tensor,  # [N, E] any float
    prototypes: Tensor,  # [K, E] any float
    *,
    temperature: float,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] fp32
    """Return log K - H(mean_n softmax(logits_n / temperature)) >= 0, MSN's me-max; 0 when even.

    It is the Kullback-Leibler divergence of the mean assignment from the uniform one. Logits are
    computed in blocks of rows, once forward and once more for the gradient. Raises ValueError for
    tensors that are no matrices of one width, or a temperature that is not positive.
    """
    if features.dim() != 2 or prototypes.dim() != 2 or features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            "features, prototypes: expected shapes [N, E] and [K, E], got "
            f"{list(features.shape)} and {list(prototypes.shape)}"
        )
    scale = inverse_temperature(temperature, features)
    rows = wide(features)
    total_K = _SumOfSoftmaxes.apply(rows, wide(prototypes), scale)
    share_K = sum_over_ranks(total_K, process_group) / num_rows(rows, process_group)
    # A prototype that nobody chose: 0 log 0 = 0, and its gradient is finite.
    log_share = share_K.clamp_min(torch.finfo(share_K.dtype).tiny).log()
    return math.log(len(prototypes)) + (share_K * log_share).sum()
