"""-log P(z | z_hat) with what keeps z from collapsing, by name: what a term is computed with.

`LIKELIHOODS` maps (target, likelihood, regulariser) to a function that builds the loss; the formula
of each is in `m3i_fast.config.losses`. A loss of dense targets and of embeddings is called as
loss(z_hat, z); what it has to remember from step to step makes it a module.

With a process group a loss is that of the rows of all ranks, where rows of a batch meet, and of the
own rows where they do not (`statistics` says of gradients what that means for each). SimCLR's
negatives alone stay those of a rank. Legend: N rows, E features, K prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.losses import LossKey
from m3i_fast.config.objective import ObjectiveConfig, Term
from m3i_fast.objectives.losses.distillation import (
    centred_softmax,
    mean_entropy,
    self_distillation,
    sinkhorn_knopp,
    update_centre,
)
from m3i_fast.objectives.losses.regularisers import (
    barlow_twins,
    unigrad,
    update_correlation,
    vicreg,
)
from m3i_fast.objectives.losses.similarity import (
    dense_contrastive,
    info_nce,
    moco,
    negative_cosine_similarity,
    nt_xent,
)
from m3i_fast.objectives.row_statistics import sum_over_ranks, wide
from m3i_fast.ops import IGNORED, boltzmann, gaussian

Loss = Callable[..., Tensor]
Group = dist.ProcessGroup | None
Build = Callable[[Term, ObjectiveConfig, int, Group], Loss]
"""(term, objective, width of z, process group) -> the loss, a module where it keeps something."""


class Queued(nn.Module):
    """MoCo's loss, with a queue of the targets of earlier steps as negatives.

    Ranks of a process group have as many rows each, and one queue.
    """

    queue: Tensor  # [K, E] fp32, unit rows, newest first

    def __init__(self, temperature: float, queue_length: int, dim: int, group: Group) -> None:
        super().__init__()
        self.temperature, self.group = temperature, group
        self.register_buffer("queue", torch.empty(queue_length, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.queue.copy_(F.normalize(torch.randn_like(self.queue), dim=-1))

    def forward(self, z_hat: Tensor, z: Tensor) -> Tensor:  # [N, E], [N, E] -> []
        value = moco(z_hat, z, self.queue.clone(), temperature=self.temperature)
        self._remember(z)
        return value

    @torch.no_grad()
    def _remember(self, z: Tensor) -> None:
        if not self.training:
            return
        newest = [F.normalize(z.to(self.queue.dtype), dim=-1)]
        if self.group is not None:
            own = newest[0]
            newest = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(newest, own, group=self.group)
        self.queue.copy_(torch.cat([*newest, self.queue])[: len(self.queue)])


class DenseQueued(Queued):
    """DenseCL's loss: the queue holds one target an image, the mean of its cells' projections."""

    def forward(  # type: ignore[override]
        self, z_hat: Tensor, z: Tensor, features_hat: Tensor, features: Tensor
    ) -> Tensor:  # [N, n, E], [N, m, E], [N, n, C], [N, m, C] -> []
        value = dense_contrastive(
            z_hat, z, features_hat, features, self.queue.clone(), temperature=self.temperature
        )
        self._remember(z.mean(1))
        return value


class UniGrad(nn.Module):
    """UniGrad's loss with its running correlation of the targets."""

    correlation: Tensor  # [E, E] fp32

    def __init__(self, dim: int, group: Group) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("correlation", torch.empty(dim, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.correlation.zero_()

    @torch.no_grad()
    def observe(self, z: Sequence[Tensor]) -> None:  # 1 or 2 x [N, E]
        """Take the targets of all views of a step, once and before its losses, as the authors do.

        The first step's are the correlation, later ones move it.
        """
        if self.training:
            pair = [F.normalize(wide(z[n]), dim=-1) for n in (0, -1)]
            group = self.group
            first = update_correlation(self.correlation, *pair, momentum=0.0, process_group=group)
            moved = update_correlation(self.correlation, *pair, process_group=group)
            self.correlation.copy_(torch.where(self.correlation.any(), moved, first))

    def forward(self, z_hat: Tensor, z: Tensor) -> Tensor:  # [N, E], [N, E] -> []
        z_hat, z = F.normalize(wide(z_hat), dim=-1), F.normalize(wide(z), dim=-1)
        return unigrad(z_hat, z, self.correlation.clone())


# ---- Over prototypes: targets(the teacher's logits of all views), then loss(logits, targets) -----


class Prototypes(nn.Module, ABC):
    """Cross-entropy with the teacher's assignment; what that is, classes below say.

    Called once a step, with the rows of all views: a mean over them knows no order of the views.
    """

    def __init__(self, temperature: float, group: Group) -> None:
        super().__init__()
        self.temperature, self.group = temperature, group

    @abstractmethod
    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """The teacher's logits [N, K] of each target view as probabilities, without gradient."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:  # [N, K], [N, K] -> []
        return self_distillation(logits, targets, temperature=self.temperature)


class Centred(Prototypes):
    """DINO, arXiv 2104.14294: centred with momentum 0.9, sharpened by temperature 0.04."""

    SHARP = 0.04
    centre: Tensor  # [K] fp32

    def __init__(self, temperature: float, group: Group, num_prototypes: int) -> None:
        super().__init__(temperature, group)
        self.register_buffer("centre", torch.empty(num_prototypes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.centre.zero_()

    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        found = [centred_softmax(view, self.centre, temperature=self.SHARP) for view in logits]
        if self.training:  # once for all views: none is centred by another one
            rows = torch.cat(list(logits))
            self.centre.copy_(update_centre(self.centre, rows, process_group=self.group))
        return found


class Balanced(Prototypes):
    """SwAV, arXiv 2006.09882: Sinkhorn-Knopp spreads the rows evenly over prototypes."""

    SHARP = 0.05

    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        return [
            sinkhorn_knopp(view, temperature=self.SHARP, process_group=self.group)
            for view in logits
        ]


class MeanEntropy(Prototypes):
    """MSN, arXiv 2204.07141: sharpened targets, and the mean assignment kept even (me-max)."""

    SHARP = 0.25  # times the temperature
    WEIGHT = 1.0

    def targets(self, logits: Sequence[Tensor]) -> list[Tensor]:
        sharp = self.SHARP * self.temperature
        rows = [(wide(view) / sharp).log_softmax(-1) for view in logits]
        return [sinkhorn_knopp(view, temperature=1.0, process_group=self.group) for view in rows]

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        spread = mean_entropy(logits, temperature=self.temperature, process_group=self.group)
        return super().forward(logits, targets) + self.WEIGHT * spread


# ---- The table -----------------------------------------------------------------------------------


def _category(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> Loss:
    """Every rank has all categories: only the number of rows is that of all."""

    def loss(z_hat: Tensor, z: Tensor, scale: Tensor, *, targets: Tensor) -> Tensor:
        if group is None:
            return boltzmann(z_hat, z, scale, targets=targets)
        own = boltzmann(z_hat, z, scale, targets=targets, reduction="sum")
        members = sum_over_ranks((targets != IGNORED).sum().to(own.dtype), group)
        return sum_over_ranks(own, group) / members.clamp_min(1)

    return loss


def _dense_gaussian(term: Term, cfg: ObjectiveConfig, dim: int, group: Group) -> Loss:
    return partial(
        gaussian,
        sigma=cfg.sigma,
        normalise=term.target == "features",  # pixels are normalised by their own statistics
        process_group=group,
        decorrelation_weight=cfg.decorrelation_weight if term.decorrelates else 0.0,
        centred=term.regulariser == "covariance",
    )


LIKELIHOODS: dict[LossKey, Build] = {
    ("category", "boltzmann", "negatives"): _category,
    ("caption", "boltzmann", "negatives"): lambda term, cfg, dim, group: partial(
        boltzmann, process_group=group, equal_sizes=True
    ),
    ("caption", "sigmoid", "negatives"): lambda term, cfg, dim, group: partial(
        boltzmann, form="sigmoid", process_group=group, equal_sizes=True
    ),
    ("pixels", "gaussian", "fixed"): _dense_gaussian,
    ("features", "gaussian", "stop_gradient"): _dense_gaussian,
    ("features", "gaussian", "decorrelation"): _dense_gaussian,
    ("features", "gaussian", "covariance"): _dense_gaussian,
    ("features", "boltzmann", "queue"): lambda term, cfg, dim, group: DenseQueued(
        term.temperature, cfg.queue_length, dim, group
    ),
    ("embedding", "boltzmann", "queue"): lambda term, cfg, dim, group: Queued(
        term.temperature, cfg.queue_length, dim, group
    ),
    ("embedding", "boltzmann", "negatives"): lambda term, cfg, dim, group: partial(
        info_nce, temperature=term.temperature, process_group=group
    ),
    ("embedding", "boltzmann", "all_views"): lambda term, cfg, dim, group: partial(
        nt_xent, temperature=term.temperature
    ),
    ("embedding", "gaussian", "stop_gradient"): lambda term, cfg, dim, group: (
        negative_cosine_similarity
    ),
    ("embedding", "gaussian", "cross_correlation"): lambda term, cfg, dim, group: partial(
        barlow_twins, process_group=group
    ),
    ("embedding", "gaussian", "variance_covariance"): lambda term, cfg, dim, group: partial(
        vicreg, process_group=group
    ),
    ("embedding", "gaussian", "running_correlation"): lambda term, cfg, dim, group: UniGrad(
        dim, group
    ),
    ("prototypes", "boltzmann", "centring"): lambda term, cfg, dim, group: Centred(
        term.temperature, group, cfg.num_prototypes
    ),
    ("prototypes", "boltzmann", "sinkhorn"): lambda term, cfg, dim, group: Balanced(
        term.temperature, group
    ),
    ("prototypes", "boltzmann", "mean_entropy"): lambda term, cfg, dim, group: MeanEntropy(
        term.temperature, group
    ),
}
