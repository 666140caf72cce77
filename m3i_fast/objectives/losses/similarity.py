"""Losses by the similarity of two views' embeddings: cosine, InfoNCE, NT-Xent, MoCo, DenseCL.

They are likelihoods of M3I (arXiv 2211.09807, section 3): the Gaussian one of unit rows, and calls
of the Boltzmann one. CLIP, SupCon and classification are plain calls of `ops.boltzmann` on unit
rows and need no function here. Each function returns a scalar in fp32 (fp64 for fp64), of the rows
of one rank unless it takes a process group.

Legend: N rows or pictures, Q cells, D features, C features of the encoder, K rows of a queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.objectives.row_statistics import full_precision, sum_over_ranks, wide
from m3i_fast.ops import boltzmann


def negative_cosine_similarity(
    z_hat: Tensor,  # [..., D] any float
    z: Tensor,  # [..., D] any float, detached
) -> Tensor:  # [] fp32
    """Return -mean cos(z_hat, z), the Gaussian likelihood of unit rows less a constant.

    SimSiam, arXiv 2011.10566, equation 1; BYOL's |u - v|^2 is 2 + 2 times it. The caller stops the
    gradient of z. Raises ValueError where the shapes differ.
    """
    if z_hat.shape != z.shape:
        raise ValueError(f"z: expected shape {list(z_hat.shape)} as z_hat, got {list(z.shape)}")
    return -F.cosine_similarity(wide(z_hat), wide(z), dim=-1).mean()


@full_precision
def cosine_smooth_l1(
    z_hat: Tensor,  # [..., D] any float
    z: Tensor,  # [..., D] any float, detached
    *,
    cosine_weight: float = 0.9,
    shares: Tensor | None = None,  # [rows], sums to 1
) -> Tensor:  # [] fp32
    """Return w mean (1 - cos(z_hat, z)) + (1 - w) mean smooth_l1(z_hat - z), with beta 1.

    shares: what each row counts for in the means; None for as much each.

    AM-RADIO, arXiv 2312.06709, equation 3: the cosine finds the direction of a teacher's cell, the
    other part its length. Raises ValueError where the shapes differ.
    """
    if shares is not None:
        own, other = (wide(rows).flatten(0, -2) for rows in (z_hat, z))
        cosines = 1 - F.cosine_similarity(own, other, dim=-1)
        lengths = F.smooth_l1_loss(own, other, reduction="none").mean(-1)
        return (shares * (cosine_weight * cosines + (1 - cosine_weight) * lengths)).sum()
    cosine = 1 + negative_cosine_similarity(z_hat, z)
    length = F.smooth_l1_loss(wide(z_hat), wide(z))
    return cosine_weight * cosine + (1 - cosine_weight) * length


# ---- InfoNCE -------------------------------------------------------------------------------------


def expect_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature: expected > 0, got {temperature}")


def sizes_of_ranks(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    counts: Sequence[int],
    process_group: dist.ProcessGroup | None,
) -> dict[str, Any]:
    """Return the argument of `ops.boltzmann` that says how many rows each rank has.

    counts: pictures of each rank, to which its rows and columns are proportional; empty where all
    ranks have as many.
    """
    if process_group is None or not counts:
        return {"equal_sizes": True}
    of_each = (_num_of_ranks(rows, counts, process_group) for rows in (z_hat, z))
    return {"sizes": list(zip(*of_each, strict=True))}


def rows_of_ranks(
    rows: Tensor,  # [N, D]
    counts: Sequence[int],
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, int]:  # [N of all ranks, D]
    """Return the rows of all ranks, in the order of ranks, and the place of this rank's first one.

    counts: as `sizes_of_ranks` takes it. Differentiable: a row's gradient is that of all ranks.
    """
    if process_group is None:
        return rows, 0
    rank, sizes = dist.get_rank(process_group), _num_of_ranks(rows, counts, process_group)
    first, last = sum(sizes[:rank]), sum(sizes[rank + 1 :])
    return sum_over_ranks(F.pad(rows, (0, 0, first, last)), process_group), first


def _num_of_ranks(
    rows: Tensor, counts: Sequence[int], process_group: dist.ProcessGroup
) -> list[int]:
    shares = counts or [1] * dist.get_world_size(process_group)
    own = shares[dist.get_rank(process_group)]
    return [len(rows) * share // own for share in shares]


def info_nce(
    z_hat: Tensor,  # [N, D] any float
    z: Tensor,  # [N, D] any float
    *,
    temperature: float,
    process_group: dist.ProcessGroup | None = None,
    counts: Sequence[int] = (),
) -> Tensor:  # [] fp32
    """Return -mean_n log softmax_m(cos(z_hat_n, z_m) / temperature)_n over the batch's targets m.

    InfoNCE, arXiv 1807.03748; MoCo v3 (arXiv 2104.02057, algorithm 1) is 2 temperature times it.
    With a process group the batch is that of all ranks, of which each has N rows, or as many as
    `counts` say (`sizes_of_ranks`).
    """
    expect_temperature(temperature)
    z_hat, z = (F.normalize(wide(rows), dim=-1) for rows in (z_hat, z))
    scale = z_hat.new_full((), 1 / temperature)
    sizes = sizes_of_ranks(z_hat, z, counts, process_group)
    return boltzmann(z_hat, z, scale, symmetric=False, process_group=process_group, **sizes)


@full_precision
def nt_xent(
    z_a: Tensor,  # [N, D] any float
    z_b: Tensor,  # [N, D] any float
    *,
    temperature: float,
    process_group: dist.ProcessGroup | None = None,
    counts: Sequence[int] = (),
) -> Tensor:  # [] fp32
    """Return -mean log softmax(cos / temperature) of a row's other view among all other rows.

    SimCLR, arXiv 2002.05709, equation 1; rows are normalised here. With a process group other rows
    are those of all ranks, of which each has N, or as many as `counts` say (`sizes_of_ranks`).
    Logits are held in memory, [2N, 2N of all ranks], since a row is no candidate of its own and
    `ops.boltzmann` cannot leave one out. Raises ValueError for shapes that differ, or a temperature
    that is not positive.
    """
    if z_a.dim() != 2 or z_b.shape != z_a.shape:
        raise ValueError(
            f"z_a, z_b: expected one shape [N, D], got {list(z_a.shape)} and {list(z_b.shape)}"
        )
    expect_temperature(temperature)
    rows = F.normalize(torch.cat([wide(z_a), wide(z_b)]), dim=-1)
    candidates, first = rows_of_ranks(rows, counts, process_group)
    places = torch.arange(len(candidates), device=rows.device)
    own = places[first : first + len(rows)]
    logits = (rows @ candidates.T / temperature).masked_fill(own[:, None] == places, -torch.inf)
    partner = own.roll(len(z_a))
    if process_group is None:
        return F.cross_entropy(logits, partner)
    total = sum_over_ranks(F.cross_entropy(logits, partner, reduction="sum"), process_group)
    return total / len(candidates)


def moco(
    q: Tensor,  # [N, D] any float
    k: Tensor,  # [N, D] any float, detached
    queue: Tensor,  # [K, D] any float, unit rows
    *,
    temperature: float,
) -> Tensor:  # [] fp32
    """Return -mean_n log softmax of q_n . k_n among that and q_n . queue_j, all / temperature.

    MoCo, arXiv 1911.05722, equation 1; q and k are normalised here. Other rows' k are no
    candidates. It is one call of `ops.boltzmann` in memory O(N + K): q_n . k_n is one more feature
    of row n, which only one more candidate has. Raises ValueError for other shapes, or a
    temperature that is not positive.
    """
    if q.dim() != 2 or k.shape != q.shape or queue.dim() != 2 or queue.shape[1] != q.shape[1]:
        raise ValueError(
            "q, k, queue: expected shapes [N, D], [N, D], [K, D], got "
            f"{list(q.shape)}, {list(k.shape)}, {list(queue.shape)}"
        )
    expect_temperature(temperature)
    q, k = (F.normalize(wide(rows), dim=-1) for rows in (q, k))
    rows = torch.cat([q, (q * k).sum(-1, keepdim=True)], dim=1)
    own_key = F.pad(q.new_zeros(1, q.shape[1]), (0, 1), value=1.0)
    candidates = torch.cat([own_key, F.pad(queue.to(q.dtype), (0, 1))])
    first = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    return boltzmann(rows, candidates, q.new_full((), 1 / temperature), targets=first)


def dense_contrastive(
    q: Tensor,  # [N, Q, D] any float, dense projections of a view
    k: Tensor,  # [N, Q', D] any float, those of the other view; detached
    q_features: Tensor,  # [N, Q, C] any float, the encoder's, of the same cells
    k_features: Tensor,  # [N, Q', C] any float
    queue: Tensor,  # [K, D] any float, unit rows
    *,
    temperature: float,
) -> Tensor:  # [] fp32
    """Return `moco` of every cell with the other view's cell of the most similar features.

    DenseCL, arXiv 2011.09157, section 3; similar by the cosine of the encoder's features.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        of_q, of_k = (F.normalize(wide(x), dim=-1) for x in (q_features, k_features))
        match = (of_q @ of_k.mT).argmax(-1)  # [N, Q]
    matched = k.gather(1, match[..., None].expand(-1, -1, k.shape[-1]))
    return moco(q.flatten(0, 1), matched.flatten(0, 1), queue, temperature=temperature)
