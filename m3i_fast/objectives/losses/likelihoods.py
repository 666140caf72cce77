"""-log P(z | z_hat) with what keeps z from collapsing, by name: what a term is computed with.

`LIKELIHOODS` maps (target, likelihood, regulariser) to a formula and to a function that builds the
loss. A loss of dense targets and of embeddings is called as loss(z_hat, z); what it has to remember
from step to step makes it a module.

With a process group a loss is that of the rows of all ranks, where rows of a batch meet, and of the
own rows where they do not (`statistics` says of gradients what that means for each). SimCLR's
negatives alone stay those of a rank. Legend: N rows, E features, K prototypes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

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

if TYPE_CHECKING:
    from m3i_fast.objectives.config import ObjectiveConfig, Term

Loss = Callable[..., Tensor]
Group = dist.ProcessGroup | None


@dataclass(frozen=True, slots=True)
class Likelihood:
    formula: str
    """What is minimised, in plain text; z carries no gradient where it says sg(z)."""
    build: Callable[[Term, ObjectiveConfig, int, Group], Loss]
    """(term, objective, width of z, process group) -> the loss, a module where it keeps
    something."""


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


SOFTMAX = "-log exp(z_hat . z / tau) / sum_z' exp(z_hat . z' / tau)"
LIKELIHOODS: dict[tuple[str, str, str], Likelihood] = {
    ("category", "boltzmann", "negatives"): Likelihood(
        f"{SOFTMAX}, z' all categories, rows of unit length, tau learnt",
        _category,
    ),
    ("caption", "boltzmann", "negatives"): Likelihood(
        f"mean of both directions of {SOFTMAX}, z' captions of the batch, tau learnt",
        lambda term, cfg, dim, group: partial(boltzmann, process_group=group, equal_sizes=True),
    ),
    ("caption", "sigmoid", "negatives"): Likelihood(
        "1/N sum over pairs of log(1 + exp(-y (z_hat . z / tau + b))), y = 1 for a picture and its "
        "caption, else -1; tau, b learnt",
        lambda term, cfg, dim, group: partial(
            boltzmann, form="sigmoid", process_group=group, equal_sizes=True
        ),
    ),
    ("pixels", "gaussian", "fixed"): Likelihood(
        "|z_hat - z|^2 / (2 sigma^2 E), z the pixels of a patch less their mean, over their "
        "standard deviation",
        _dense_gaussian,
    ),
    ("features", "gaussian", "stop_gradient"): Likelihood(
        "|z_hat - LN(sg(z))|^2 / (2 sigma^2 E)", _dense_gaussian
    ),
    ("features", "gaussian", "decorrelation"): Likelihood(
        "(|z_hat - LN(sg(z))|^2 / (2 sigma^2) + w z_hat^T C z_hat) / E, C = mean of LN(z) LN(z)^T",
        _dense_gaussian,
    ),
    ("features", "gaussian", "covariance"): Likelihood(
        "(|z_hat - LN(sg(z))|^2 / (2 sigma^2) + w z_hat^T C z_hat) / E, C = covariance of LN(z)",
        _dense_gaussian,
    ),
    ("features", "boltzmann", "queue"): Likelihood(
        f"{SOFTMAX}, z the target cell whose features are most alike, z' it and a queue",
        lambda term, cfg, dim, group: DenseQueued(term.temperature, cfg.queue_length, dim, group),
    ),
    ("embedding", "boltzmann", "queue"): Likelihood(
        f"{SOFTMAX}, z' the own target and a queue of earlier ones, rows of unit length",
        lambda term, cfg, dim, group: Queued(term.temperature, cfg.queue_length, dim, group),
    ),
    ("embedding", "boltzmann", "negatives"): Likelihood(
        f"{SOFTMAX}, z' targets of the batch, rows of unit length",
        lambda term, cfg, dim, group: partial(
            info_nce, temperature=term.temperature, process_group=group
        ),
    ),
    ("embedding", "boltzmann", "all_views"): Likelihood(
        f"{SOFTMAX}, z' both views of the batch but the row itself, rows of unit length",
        lambda term, cfg, dim, group: partial(nt_xent, temperature=term.temperature),
    ),
    ("embedding", "gaussian", "stop_gradient"): Likelihood(
        "-cos(z_hat, sg(z)): |z_hat - z|^2 / 2 of unit rows, less a constant",
        lambda term, cfg, dim, group: negative_cosine_similarity,
    ),
    ("embedding", "gaussian", "cross_correlation"): Likelihood(
        "sum_i (1 - C_ii)^2 + 0.005 sum_{i != j} C_ij^2, C the correlation of both views",
        lambda term, cfg, dim, group: partial(barlow_twins, process_group=group),
    ),
    ("embedding", "gaussian", "variance_covariance"): Likelihood(
        "25 |z_hat - z|^2 / E + 25 mean of both views' max(0, 1 - std) + sum of both views' "
        "off-diagonal covariance^2 / E",
        lambda term, cfg, dim, group: partial(vicreg, process_group=group),
    ),
    ("embedding", "gaussian", "running_correlation"): Likelihood(
        "-z_hat . sg(z) + 50 z_hat^T F z_hat, F a running mean of z z^T, rows of unit length",
        lambda term, cfg, dim, group: UniGrad(dim, group),
    ),
    ("prototypes", "boltzmann", "centring"): Likelihood(
        "-sum_k p_k log softmax(z_hat / tau)_k, p = softmax((z - c) / 0.04), c a running mean",
        lambda term, cfg, dim, group: Centred(term.temperature, group, cfg.num_prototypes),
    ),
    ("prototypes", "boltzmann", "sinkhorn"): Likelihood(
        "-sum_k p_k log softmax(z_hat / tau)_k, p = Sinkhorn-Knopp(z / 0.05)",
        lambda term, cfg, dim, group: Balanced(term.temperature, group),
    ),
    ("prototypes", "boltzmann", "mean_entropy"): Likelihood(
        "-sum_k p_k log softmax(z_hat / tau)_k + log K - H(mean softmax(z_hat / tau)), p = "
        "Sinkhorn-Knopp(log softmax(4 z / tau))",
        lambda term, cfg, dim, group: MeanEntropy(term.temperature, group),
    ),
}
