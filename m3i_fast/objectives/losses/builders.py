"""What builds each loss of `config.objective.losses.LOSSES`, and builds the loss of a term.

A builder takes the term, the objective's config, the width of z and the process group. The loss
that it returns is called as loss(z_hat, z) for pixels, features and embeddings, and returns a
scalar; a loss of prototypes also has `targets` (`stateful.Prototypes`), one of summaries is called
as loss(z), and one of categories and captions takes what `ops.boltzmann` takes.

With a process group a loss is that of the rows of all ranks where rows of a batch meet, and of the
rank's rows where they do not (`row_statistics` says what that means for gradients). KoLeo's
neighbours alone stay those of a rank, as in DINOv2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config.objective.losses import LOSSES
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.objectives.losses import similarity
from m3i_fast.objectives.losses.annotations import binary_cross_entropy, known_squares
from m3i_fast.objectives.losses.dense import gaussian_of_rows
from m3i_fast.objectives.losses.regularisers import barlow_twins, koleo, vicreg
from m3i_fast.objectives.losses.sigreg import LeJepa, SigReg
from m3i_fast.objectives.losses.similarity import (
    info_nce,
    negative_cosine_similarity,
    nt_xent,
    sizes_of_ranks,
)
from m3i_fast.objectives.losses.stateful import (
    Balanced,
    Centred,
    DenseQueued,
    Group,
    JointlyBalanced,
    MeanEntropy,
    Queued,
    UniGrad,
)
from m3i_fast.objectives.row_statistics import sum_over_ranks
from m3i_fast.ops import IGNORED, boltzmann

LossFunction = Callable[..., Tensor]


def build_loss(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the loss of a term from its row of `LOSSES`, whose path is resolved here.

    dim: the width of z. The result is an `nn.Module` where it keeps something from step to step.
    Raises ModuleNotFoundError or AttributeError for a path that leads nowhere.
    """
    build = LOSSES[term.loss_key].build
    if isinstance(build, str):
        build = resolve_name(build)
    return build(term, cfg, dim, group)


# ---- Labels --------------------------------------------------------------------------------------


def category(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the softmax over all categories, or a vocabulary; rows alone are sharded."""
    return partial(_category, group=group)


def _category(
    z_hat: Tensor, z: Tensor, scale: Tensor, *, targets: Tensor, group: Group
) -> Tensor:  # []
    if group is None:
        return boltzmann(z_hat, z, scale, targets=targets)
    own = boltzmann(z_hat, z, scale, targets=targets, reduction="sum")
    members = sum_over_ranks((targets != IGNORED).sum().to(own.dtype), group)
    return sum_over_ranks(own, group) / members.clamp_min(1)


def caption(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the softmax over the captions of all ranks, in both directions."""
    return _of_all_ranks(group)


def caption_sigmoid(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the sigmoid of every pair of a picture and a caption of all ranks."""
    return _of_all_ranks(group, form="sigmoid")


def _of_all_ranks(group: Group, **fixed: Any) -> LossFunction:
    """Return `boltzmann` over the rows of all ranks, as many on each or as many as `counts` say."""
    return partial(_boltzmann_of_all_ranks, group=group, **fixed)


def _boltzmann_of_all_ranks(
    z_hat: Tensor,
    z: Tensor,
    scale: Tensor,
    *,
    group: Group,
    counts: Sequence[int] = (),
    **options: Any,
) -> Tensor:  # []
    sizes = sizes_of_ranks(z_hat, z, counts, group)
    return boltzmann(z_hat, z, scale, process_group=group, **sizes, **options)


def labels(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the mean over labels of rows' binary cross-entropies, of rows with labels alone."""
    return partial(binary_cross_entropy, process_group=group)


def numbers(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the squared distance over 2 sigma^2, of the numbers that are known."""
    return partial(known_squares, sigma=cfg.sigma, process_group=group)


# ---- Cells ---------------------------------------------------------------------------------------


def dense_gaussian(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the squared distance of pixels or features, decorrelated where the term says so."""
    return partial(
        gaussian_of_rows,
        sigma=cfg.sigma,
        normalise=term.layer_norms,  # pixels are normalised by their own statistics
        process_group=group,
        decorrelation_weight=cfg.decorrelation_weight if term.decorrelates else 0.0,
        centred=term.regulariser == "covariance",
    )


def cosine_smooth_l1(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build AM-RADIO's loss of a teacher's cells, of the rows of one rank."""
    return similarity.cosine_smooth_l1


def squared_distance(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the mean squared distance of the rows of one rank."""
    return F.mse_loss


def dense_queue(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build DenseCL's loss of cells."""
    return DenseQueued(term.temperature, cfg.queue_length, dim, group)


# ---- Embeddings ----------------------------------------------------------------------------------


def queue(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build MoCo's loss."""
    return Queued(term.temperature, cfg.queue_length, dim, group)


def batch_negatives(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build InfoNCE over the targets of all ranks."""
    return partial(info_nce, temperature=term.temperature, process_group=group)


def all_views(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build SimCLR's NT-Xent over both views of all ranks."""
    return partial(nt_xent, temperature=term.temperature, process_group=group)


def cosine(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build the negative cosine similarity, of the rows of one rank."""
    return negative_cosine_similarity


def cross_correlation(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build Barlow Twins' loss."""
    return partial(barlow_twins, process_group=group)


def variance_covariance(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build VICReg's loss."""
    return partial(vicreg, process_group=group)


def running_correlation(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build UniGrad's loss."""
    return UniGrad(dim, group)


# ---- Prototypes ----------------------------------------------------------------------------------


def centring(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build DINO's loss."""
    return Centred(term.temperature, group, cfg.num_prototypes, **_of_targets(term))


def sinkhorn(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build SwAV's loss."""
    return Balanced(term.temperature, group, **_of_targets(term))


def joint_sinkhorn(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build DINOv2's loss with Sinkhorn-Knopp over all target views."""
    return JointlyBalanced(term.temperature, group, **_of_targets(term))


def mean_entropy(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build MSN's loss."""
    return MeanEntropy(term.temperature, group, **_of_targets(term))


def _of_targets(term: Term) -> dict[str, Any]:
    """Return the temperature of a term's targets, as `stateful.Prototypes` takes it."""
    names = "target_temperature", "target_warmup_steps"
    return {name: getattr(term, name) for name in names}


# ---- Summaries -----------------------------------------------------------------------------------


def nearest_neighbour(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build KoLeo's entropy term, of the rows of one rank."""
    return koleo


def gaussian_slices(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build SIGReg, of the rows of all ranks; it is called as loss(views, the step's key)."""
    return SigReg(cfg.num_slices, group)


def views_and_slices(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> LossFunction:
    """Build LeJEPA's loss, called as loss(z_hat, z, the step's key) of all views."""
    return LeJepa(cfg.sigreg_weight, cfg.num_slices, group)
