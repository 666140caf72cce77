"""Collapse monitors, which measure the entropy left in the targets on logged steps.

Pure functions without gradient and without host synchronisation. Each returns a scalar in fp32
(fp64 for fp64 features, except RankMe) and computes in that dtype, also under autocast.
`m3i_fast.observe.collapse` has the healthy ranges.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.models.effective_rank import rankme
from m3i_fast.models.transformer.ragged import Cells, mean_of_cells, tensor_of
from m3i_fast.objectives.row_statistics import full_precision, wide

if TYPE_CHECKING:
    from m3i_fast.objectives.step_context import Monitor

MAX_ROWS = 512  # for costs that grow with rows squared, or with rows times clusters
NUM_CLUSTERS = 16
NUM_ITERATIONS = 10


@torch.no_grad()
def target_monitors(
    tokens: Cells,  # [A, N, C], normalised targets; the encoder's own where there are none
    student: Cells | None = None,  # [A, n, C], the encoder's normalised tokens of the same images
) -> dict[str, Tensor]:
    """Measure rank, uniformity, clusters, spread and alignment of targets, by logged name.

    `target_std`, the spread over images, is left out for a single image.
    """
    rows = tensor_of(tokens)
    some = subsample(rows)
    metrics = {
        "monitor/target_rank": rankme(rows),
        "monitor/target_uniformity": uniformity(some),
        "monitor/target_kmeans_entropy": kmeans_entropy(some),
    }
    if len(tokens) > 1:
        metrics["monitor/target_std"] = feature_std(mean_of_cells(tokens))
    if student is not None:
        metrics["monitor/target_alignment"] = alignment(
            mean_of_cells(student), mean_of_cells(tokens)
        )
    return metrics


def feature_std(features: Tensor) -> Tensor:  # [..., D] -> [] fp32
    """Measure the spread of unit-length rows: 1 when even over all dimensions, 0 when collapsed.

    The mean over dimensions of the standard deviation, times sqrt(D).
    """
    rows = F.normalize(features.float().flatten(0, -2), dim=-1)
    return rows.std(0, correction=0).mean() * rows.shape[-1] ** 0.5


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:  # [..., D], [..., D] -> [] fp32
    """Average the cosine of matching rows (teacher and student, prediction and target)."""
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean()


@torch.no_grad()
def log_prediction(
    monitor: Monitor,
    name: str,
    *,
    z_hat: Tensor,  # [..., D], predictions of a dense term
    z: Tensor,  # [..., D], its targets, normalised as the loss has them
) -> None:
    """Log `NAME_cosine`, `NAME_explained` and `NAME_constant` of a dense term.

    They measure how much of the target there is to predict and how much is predicted, over the
    rows of this rank. A single row has no variance, so that only `NAME_cosine` is logged.
    """
    monitor(f"{name}_cosine", mean_cosine(z_hat, z))
    if z.shape[:-1].numel() < 2:
        return
    monitor(f"{name}_explained", explained_variance(z_hat, z))
    monitor(f"{name}_constant", constant_energy(z))


def explained_variance(z_hat: Tensor, z: Tensor) -> Tensor:  # [..., D], [..., D] -> []
    """Compute the share of the targets' variance that is predicted.

    1 - E|z - z_hat|^2 / E|z - E z|^2: 1 where predictions equal the targets, 0 where they equal the
    mean target, negative where they are another constant. For equal targets, which have no
    variance, the divisor is the rounding error of their energy: the value is finite and means
    nothing.
    """
    rows, predicted = wide(z).flatten(0, -2), wide(z_hat).flatten(0, -2)
    energy = rows.square().sum()
    variance = (rows - rows.mean(0)).square().sum()
    least = energy * torch.finfo(rows.dtype).eps
    return 1 - (rows - predicted).square().sum() / torch.maximum(variance, least)


def constant_energy(z: Tensor) -> Tensor:  # [..., D] -> []
    """Compute |E z|^2 / E|z|^2, the share of the targets' energy in their mean vector."""
    rows = wide(z).flatten(0, -2)
    return rows.mean(0).square().sum() / rows.square().sum(-1).mean()


def subsample(features: Tensor) -> Tensor:  # [..., D] -> [min(rows, MAX_ROWS), D]
    """Select at most MAX_ROWS rows, the same ones at every step.

    The rows are drawn once at random: evenly spaced ones could all be of one column of the grid.
    """
    rows = features.flatten(0, -2)
    if rows.shape[0] <= MAX_ROWS:
        return rows
    drawn = torch.randperm(rows.shape[0], generator=torch.Generator().manual_seed(0))[:MAX_ROWS]
    return rows[drawn.sort().values.to(rows.device)]


def alignment(a: Tensor, b: Tensor) -> Tensor:  # [..., D], [..., D] -> []
    """Compute the mean of |a / |a| - b / |b||^2 over matching rows, 0 (equal) to 4 (opposite).

    Wang and Isola, arXiv 2005.10242, section 4.1.1, alpha = 2.
    """
    u, v = (F.normalize(wide(x), dim=-1) for x in (a, b))
    return (u - v).square().sum(-1).mean()


def uniformity(features: Tensor) -> Tensor:  # [..., D] -> []
    """Compute log mean exp(-2 |u_i - u_j|^2) over all pairs i < j of unit rows; 0 when collapsed.

    Wang and Isola, arXiv 2005.10242, section 4.1.2, t = 2: at least -8, -4 for orthogonal rows. The
    cost is quadratic in the rows; pass a `subsample`. NaN for fewer than two rows.
    """
    rows = F.normalize(wide(features).flatten(0, -2), dim=-1)
    return F.pdist(rows).square().mul(-2).exp().mean().log()


@full_precision
def kmeans(features: Tensor, num_clusters: int) -> Tensor:  # [N, D] -> [N] int64
    """Assign every row to a cluster by NUM_ITERATIONS of Lloyd's algorithm, deterministically.

    The initial centres are the first row and then, repeatedly, the row farthest from all centres so
    far. A cluster without rows keeps its centre.
    """
    rows = wide(features)
    centres_KD = _farthest_rows(rows, num_clusters)
    for _ in range(NUM_ITERATIONS):
        cluster = _distances(rows, centres_KD).argmin(1)
        member_KN = _members(cluster, num_clusters).to(rows.dtype)
        count_K1 = member_KN.sum(1, keepdim=True)
        means_KD = member_KN @ rows / count_K1.clamp_min(1)
        centres_KD = torch.where(count_K1 > 0, means_KD, centres_KD)
    return _distances(rows, centres_KD).argmin(1)


def kmeans_entropy(features: Tensor, num_clusters: int = NUM_CLUSTERS) -> Tensor:  # [..., D] -> []
    """Compute the entropy of the sizes of k-means clusters of unit rows, over log k.

    1 for clusters of one size, 0 for a single cluster: it measures how many kinds of targets there
    are, `uniformity` how far apart they are. NaN where a feature is not finite.
    """
    rows = F.normalize(wide(features).flatten(0, -2), dim=-1)
    share = _members(kmeans(rows, num_clusters), num_clusters).to(rows.dtype).mean(1)
    entropy = -torch.xlogy(share, share).sum() / math.log(num_clusters)
    return torch.where(rows.isfinite().all(), entropy, torch.nan)


def _members(cluster: Tensor, num_clusters: int) -> Tensor:  # [N] -> [K, N] bool
    return torch.arange(num_clusters, device=cluster.device)[:, None] == cluster


def _farthest_rows(rows: Tensor, number: int) -> Tensor:  # [N, D] -> [number, D]
    chosen = [rows[:1]]
    nearest = _distances(rows, chosen[0]).squeeze(1)
    for _ in range(number - 1):
        # Indexing by a device scalar would synchronise with the host; index_select does not.
        chosen.append(rows.index_select(0, nearest.argmax(keepdim=True)))
        nearest = torch.minimum(nearest, _distances(rows, chosen[-1]).squeeze(1))
    return torch.cat(chosen)


def _distances(rows: Tensor, centres: Tensor) -> Tensor:  # [N, D], [K, D] -> [N, K]
    """Compute distances without matrix products, whose rounding would tell equal rows apart."""
    return torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist")
