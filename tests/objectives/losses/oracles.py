"""What the objectives' functions are compared with: code that others wrote, on the same tensors.

`measure` gives the error of a row of ORACLES. Where lightly says "port of", the authors' code is
meant; theirs are not packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from lightly import loss as lightly
from lightly.loss import emp_ssl_loss, msn_loss, swav_loss, vicreg_loss
from lightly.models import utils as lightly_models
from lightly.models.modules.center import Center
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from m3i_fast.objectives import targets
from m3i_fast.objectives.losses import distillation, regularisers, similarity
from m3i_fast.ops import SoftTargets, boltzmann, gaussian

N, D, K = 24, 10, 16
TEMPERATURE = 0.2

Function = Callable[..., Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:  # fp64
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(function(x.requires_grad_()), x)[0]


@dataclass(frozen=True, slots=True)
class Oracle:
    name: str
    source: str
    ours: Function
    theirs: Function
    shapes: Sequence[Sequence[int]]
    """Of the random tensors that both are called with."""
    num_learnt: int
    """The first of them, by which gradients are compared."""

    def __str__(self) -> str:
        return f"{self.name}, {self.source}"

    def draw(self) -> list[Tensor]:  # fp64, with the features of a batch neither centred nor even
        rng = torch.Generator().manual_seed(0)
        drawn = [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in self.shapes]
        return [x * torch.linspace(0.2, 1.5, x.shape[-1]).double() + 0.3 for x in drawn]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Relative differences, in the norm of all elements."""

    value: float
    gradient: float | None  # None where nothing is learnt


def measure(oracle: Oracle, dtype: torch.dtype = torch.float32) -> Agreement:
    ours, theirs = (_evaluate(oracle, call, dtype) for call in (oracle.ours, oracle.theirs))
    differences = [
        float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True) if b.norm() > 0
    ]
    assert len(differences) == 1 + oracle.num_learnt, f"{oracle}: a value or gradient of zero"
    return Agreement(differences[0], max(differences[1:], default=None))


def _evaluate(oracle: Oracle, call: Function, dtype: torch.dtype) -> list[Tensor]:
    """Value and gradients in fp64, of what comes in in `dtype`."""
    inputs = [x.to(dtype) for x in oracle.draw()]
    learnt = [x.requires_grad_() for x in inputs[: oracle.num_learnt]]
    value = call(*inputs)
    gradients = torch.autograd.grad(value, learnt) if learnt else ()
    return [x.detach().double() for x in (value, *gradients)]


# ---- Calls that are more than one function -------------------------------------------------------


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _momentum_matrix() -> Tensor:
    root = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return root @ root.T / D


def _unigrad(z: Tensor, z_momentum: Tensor) -> Tensor:
    """TiCo (arXiv 2206.10698) is 1 + UniGrad's loss, of a matrix that the batch has gone into."""
    z = _unit(z)
    before = _momentum_matrix().to(z.dtype)
    matrix = regularisers.update_correlation(before, z, z, momentum=0.9)
    return 1 + regularisers.unigrad(z, _unit(z_momentum), matrix, decorrelation_weight=2 * 8.0)


def _tico(z: Tensor, z_momentum: Tensor) -> Tensor:
    criterion = lightly.TiCoLoss(beta=0.9, rho=8.0)
    criterion.C = _momentum_matrix().to(z.dtype)
    return criterion(z, z_momentum)


def _axes(logits: Tensor) -> Tensor:  # [K, K]
    """Prototypes whose products with features are the features: logits as they are."""
    return torch.eye(logits.shape[1], dtype=logits.dtype)


def soft_targets(
    logits: Tensor, temperature: float, centre: Tensor | None = None
) -> SoftTargets:  # softmax((logits - centre) / temperature)
    scale = distillation.inverse_temperature(temperature, logits)
    return SoftTargets(logits, _axes(logits), scale, None if centre is None else -scale * centre)


def balanced(
    logits: Tensor, *, temperature: float, whole_rows: bool = False, **options: Any
) -> SoftTargets:
    scale = distillation.inverse_temperature(temperature, logits)
    return SoftTargets.sinkhorn(logits, _axes(logits), scale, whole_rows=whole_rows, **options)


def probabilities(targets: SoftTargets) -> Tensor:  # [N, K]
    return torch.cat([rows.clone() for _, rows in targets.blocks()])


def of_logits(logits: Tensor, targets: SoftTargets) -> Tensor:
    return distillation.self_distillation(logits, _axes(logits), targets, temperature=0.1)


def _dino(*views: Tensor) -> Tensor:
    """Two views of the student and of the teacher, each asked for the other one."""
    student, teacher, centre = views[:2], views[2:4], views[4][0]
    pairs = ((student[1], teacher[0]), (student[0], teacher[1]))
    terms = [of_logits(of, soft_targets(to, 0.04, centre)) for of, to in pairs]
    return sum(terms) / 2


def _lightly_dino(*views: Tensor) -> Tensor:
    criterion = lightly.DINOLoss(output_dim=K)
    criterion.center = views[4][0].expand(1, 1, K)
    return criterion(list(views[2:4]), list(views[:2]))


MASK = torch.zeros(3, 4, 4, dtype=torch.bool)
MASK[0, :2], MASK[1, 1:, 1:], MASK[2, 3] = True, True, True  # 8 + 9 + 4 patches
PATCHES = int(MASK.sum())


def _ibot(student: Tensor, teacher: Tensor) -> Tensor:
    share = 1 / MASK.sum((1, 2), keepdim=True).expand_as(MASK)[MASK] / len(MASK)
    return of_logits(student, replace(soft_targets(teacher, 0.04), row_weights=share))


def _lightly_ibot(student: Tensor, teacher: Tensor) -> Tensor:
    return lightly.IBOTPatchLoss(output_dim=K)(teacher, student, MASK)


def _swav(*views: Tensor) -> Tensor:
    codes = [balanced(x.detach(), temperature=0.05, num_iterations=3) for x in views]
    return (of_logits(views[1], codes[0]) + of_logits(views[0], codes[1])) / 2


def _lightly_swav(*views: Tensor) -> Tensor:
    return lightly.SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05)(list(views), [])


def _msn(anchors: Tensor, prototypes: Tensor, positives: Tensor) -> Tensor:
    rows, prototypes, positives = (_unit(x) for x in (anchors, prototypes, positives))
    # MSN normalises rows before it sharpens and balances them; the temperature is 0.1 * 0.25.
    scale = distillation.inverse_temperature(0.025, rows)
    codes = SoftTargets.sinkhorn(positives, prototypes, scale, whole_rows=True)
    distance = distillation.self_distillation(rows, prototypes, codes, temperature=0.1)
    return distance + 0.7 * distillation.mean_entropy(rows, prototypes, temperature=0.1)


def _lightly_msn(anchors: Tensor, prototypes: Tensor, positives: Tensor) -> Tensor:
    criterion = msn_loss.MSNLoss(temperature=0.1, sinkhorn_iterations=3, regularization_weight=0.7)
    return criterion(anchors, positives, prototypes)


def _msn_regulariser(logits: Tensor) -> Tensor:
    mean = (logits / TEMPERATURE).softmax(-1).mean(0)
    return msn_loss.MSNLoss().regularization_loss(mean)


def _centre(logits: Tensor) -> Tensor:
    axes, start = _axes(logits), logits.new_zeros(K)
    first = distillation.update_centre(start, logits, axes, momentum=0.9)
    return distillation.update_centre(first, 2 * logits, axes, momentum=0.9)


def _lightly_centre(logits: Tensor) -> Tensor:
    centre = Center((1, K), momentum=0.9)
    centre.update(logits)
    centre.update(2 * logits)
    return centre.value[0]


def _with_bank(queue: Tensor) -> lightly.NTXentLoss:
    criterion = lightly.NTXentLoss(temperature=TEMPERATURE, memory_bank_size=tuple(queue.shape))
    criterion.memory_bank.bank = _unit(queue)
    return criterion


def _moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return similarity.moco(q, k, _unit(queue), temperature=TEMPERATURE)


def _lightly_moco(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return _with_bank(queue)(q, k)


def _dense(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, queue: Tensor) -> Tensor:
    return similarity.dense_contrastive(q, k, of_q, of_k, _unit(queue), temperature=TEMPERATURE)


def _lightly_dense(q: Tensor, k: Tensor, of_q: Tensor, of_k: Tensor, queue: Tensor) -> Tensor:
    matched = lightly_models.select_most_similar(of_q, of_k, k)
    return _with_bank(queue)(q.flatten(0, 1), matched.flatten(0, 1))


def _lightly_pixels(images: Tensor) -> Tensor:
    return lightly_models.normalize_mean_var(lightly_models.patchify(images, 4))


def _radio(z_hat: Tensor, z: Tensor) -> Tensor:
    alike = F.cosine_embedding_loss(z_hat, z, z_hat.new_ones(len(z_hat)))
    return 0.9 * alike + 0.1 * F.smooth_l1_loss(z_hat, z)


def _category(z_hat: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    return boltzmann(z_hat, classes, scale[0], targets=torch.arange(N) % K)


def _cross_entropy(z_hat: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * z_hat @ classes.T, torch.arange(N) % K)


# ---- The table -----------------------------------------------------------------------------------

PAIR = ((N, D), (N, D))
DENSE = ((4, 9, D), (4, 9, D), (4, 9, 6), (4, 9, 6), (K, D))

ORACLES = (
    Oracle("gaussian", "torch mse_loss", lambda a, b: gaussian(a, b, sigma=0.5**0.5), F.mse_loss,
           PAIR, 1),
    Oracle("boltzmann, caption", "open_clip ClipLoss",
           lambda a, b, scale: boltzmann(_unit(a), _unit(b), scale[0]),
           lambda a, b, scale: ClipLoss()(_unit(a), _unit(b), scale[0]), (*PAIR, (1,)), 3),
    Oracle("boltzmann, sigmoid", "open_clip SigLipLoss",
           lambda a, b, s: boltzmann(_unit(a), _unit(b), s[0], bias=s[1], form="sigmoid"),
           lambda a, b, s: SigLipLoss()(_unit(a), _unit(b), s[0], s[1]), (*PAIR, (2,)), 3),
    Oracle("boltzmann, category", "torch cross_entropy", _category, _cross_entropy,
           ((N, D), (K, D), (1,)), 3),
    Oracle("barlow_twins", "lightly BarlowTwinsLoss",
           regularisers.barlow_twins, lightly.BarlowTwinsLoss(), PAIR, 2),
    Oracle("vicreg", "lightly VICRegLoss", regularisers.vicreg, lightly.VICRegLoss(), PAIR, 2),
    Oracle("invariance", "lightly invariance_loss",
           regularisers.invariance, vicreg_loss.invariance_loss, PAIR, 2),
    Oracle("variance_hinge", "lightly variance_loss",
           regularisers.variance_hinge, vicreg_loss.variance_loss, PAIR[:1], 1),
    Oracle("covariance", "lightly covariance_loss",
           regularisers.covariance, vicreg_loss.covariance_loss, PAIR[:1], 1),
    Oracle("unigrad", "lightly TiCoLoss", _unigrad, _tico, PAIR, 1),
    # EMPSSLLoss of lightly adds this to what is minimised, where the paper maximises it: compared
    # is the rate alone, and its gradient with a formula in test_regularisers.py.
    Oracle("coding_rate", "lightly tcr_loss", regularisers.coding_rate,
           lambda z: emp_ssl_loss.tcr_loss(z[None], eps=0.2), PAIR[:1], 1),
    Oracle("koleo", "lightly KoLeoLoss, port of DINOv2",
           regularisers.koleo, lightly.KoLeoLoss(), PAIR[:1], 1),
    Oracle("mean_entropy", "lightly MSNLoss.regularization_loss",
           lambda x: distillation.mean_entropy(x, _axes(x), temperature=TEMPERATURE),
           _msn_regulariser, ((N, K),), 1),
    Oracle("update_centre", "lightly Center", _centre, _lightly_centre, ((N, K),), 0),
    Oracle("SoftTargets.sinkhorn", "lightly swav_loss.sinkhorn",
           lambda x: probabilities(balanced(x, temperature=0.05)),
           lambda x: swav_loss.sinkhorn(x, epsilon=0.05), ((N, K),), 0),
    Oracle("self_distillation, centred", "lightly DINOLoss", _dino, _lightly_dino,
           ((N, K),) * 5, 2),
    Oracle("self_distillation, by patch", "lightly IBOTPatchLoss, port of DINOv2",
           _ibot, _lightly_ibot, ((PATCHES, K),) * 2, 1),
    Oracle("self_distillation, Sinkhorn", "lightly SwaVLoss", _swav, _lightly_swav,
           ((N, K),) * 2, 2),
    Oracle("self_distillation, me-max", "lightly MSNLoss", _msn, _lightly_msn,
           ((N, D), (K, D), (N, D)), 2),
    Oracle("negative_cosine_similarity", "lightly NegativeCosineSimilarity",
           similarity.negative_cosine_similarity, lightly.NegativeCosineSimilarity(), PAIR, 2),
    Oracle("cosine_smooth_l1", "torch cosine_embedding_loss and smooth_l1_loss",
           similarity.cosine_smooth_l1, _radio, PAIR, 1),
    Oracle("nt_xent", "lightly NTXentLoss",
           lambda a, b: similarity.nt_xent(a, b, temperature=TEMPERATURE),
           lightly.NTXentLoss(temperature=TEMPERATURE), PAIR, 2),
    Oracle("moco", "lightly NTXentLoss with memory bank", _moco, _lightly_moco,
           (*PAIR, (K, D)), 2),
    Oracle("dense_contrastive", "lightly select_most_similar and NTXentLoss",
           _dense, _lightly_dense, DENSE, 2),
    Oracle("normalised_pixels", "lightly patchify and normalize_mean_var",
           lambda x: targets.normalised_pixels(x, 4), _lightly_pixels, ((2, 3, 12, 12),), 0),
)  # fmt: skip
