"""The losses that a term may have: one row a loss, by target, likelihood and regulariser.

A row holds the formula, what builds the loss, its floating-point operations and whether its rows
are independent. A loss of your own is one more row, which its file puts here
(docs/extend/new_method.md):

    LOSSES["embedding", "gaussian", "mine"] = Loss(formula=..., build=..., flops=...)

Nothing here imports torch: a row names its builder by path, which is resolved when a loss is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from m3i_fast.config.objective.flops import NONE, Flops, linear

if TYPE_CHECKING:
    from m3i_fast.config.objective.objective import ObjectiveConfig, Term

LossKey = tuple[str, str, str]
"""Target, likelihood, regulariser."""
Build = Callable[["Term", "ObjectiveConfig", int, Any], Callable[..., Any]]
"""Takes the term, the objective, the width of z and the process group (None on one rank), and
returns the loss, an `nn.Module` where it keeps something from step to step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSizes:
    """Hold the sizes of one call of a loss on one rank, from which its operations follow.

    A step calls the loss once for each direction of a symmetric term, and once for each kind of
    input view of a dense term; else once.
    """

    rows: int
    """Rows of z_hat. category, caption, labels, numbers: images and local views; caption_tokens:
    tokens but the first one of each image's caption; grounded_caption, referring_box: those of each
    region; pixels, features: cells asked; embedding, summary: images; mean_embedding: images of all
    views; prototypes: pairs of an input view and a target view; cell_prototypes: cells of those
    pairs."""
    dim: int
    """Features of a row of z_hat and of z; of prototypes, those of one."""
    targets: int
    """Rows of z on all ranks together: classes, token ids, captions of the batch, prototypes, else
    as many as z_hat's."""
    assigned: int = 0
    """Rows of the target views that a step assigns to prototypes."""
    target_grad: bool = False
    """Whether z gets a gradient: labels, and targets that the trained encoder itself gives."""
    queue_length: int = 0
    """Targets of earlier steps that the queue holds, where the regulariser is a queue."""
    cells: int = 0
    """Cells of a target view, among which a dense contrast finds each cell's match."""
    cell_dim: int = 0
    """Features of the encoder's tokens, by which it finds them."""
    decorrelates: bool = False
    """Whether `objective.decorrelation_weight` is other than 0."""
    slices: int = 0
    """Directions that the embeddings are projected on, where the regulariser is sigreg."""


FlopsOf = Callable[[LossSizes], Flops]


def no_products(sizes: LossSizes) -> Flops:
    """Return no operations: the loss has no matrix product."""
    return NONE


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Describe a loss: what it minimises, what builds it, what it costs, which rows it is of."""

    formula: str
    """What is minimised, in plain text; z carries no gradient where it says sg(z)."""
    build: str | Build
    """The builder: a callable, or the path "package.module:function" of one."""
    flops: FlopsOf
    """The matrix products of one call, forward and backward; `no_products` where it has none."""
    flops_once: FlopsOf = no_products
    """The matrix products that a step does once, however often it calls the loss."""
    independent: bool = False
    """Whether it is a mean over rows of a loss of each row alone, so that the gradients of several
    batches add up to that of all of them."""
    over_ranks: bool = False
    """Whether, with a process group, the value is that of all ranks' rows on each rank. Otherwise
    it is a mean over the rank's rows, which is weighted where ranks have unequal numbers; a loss of
    prototypes weighs those rows itself (`stateful.Prototypes`)."""
    takes_counts: bool = False
    """Whether it is called with `counts`, the pictures of each rank, where these are unequal."""

    def __post_init__(self) -> None:
        """Raise ValueError for a row that lacks its builder or its operations."""
        is_path = isinstance(self.build, str) and all(self.build.partition(":"))
        if not (callable(self.build) or is_path):
            self._refuse("build", 'a callable or "package.module:function"', self.build)
        for name in ("flops", "flops_once"):
            value = getattr(self, name)
            if not callable(value):
                self._refuse(name, "a function of LossSizes that returns Flops", value)

    def _refuse(self, field: str, expected: str, got: object) -> None:
        raise ValueError(f"{field} of the loss {self.formula!r}: expected {expected}, got {got!r}")


# ---- Matrix products in closed form: N rows, M targets, D features, a queue of K -----------------


def all_pairs(rows: int, columns: int, dim: int, *, column_grad: bool = True) -> Flops:
    """Count `ops.boltzmann`: logits, and their gradients by rows and columns.

    So do the sigmoid form and, in one process, a softmax over columns alone, whose gradients are
    computed in the forward pass; other softmaxes make the logits once more.
    """
    product = 2 * rows * columns * dim
    return Flops(product, product * (1 + column_grad))


def _all_targets(sizes: LossSizes) -> Flops:
    """Count the [N, M] logits of all rows and targets."""
    return all_pairs(sizes.rows, sizes.targets, sizes.dim, column_grad=sizes.target_grad)


def _all_targets_twice(sizes: LossSizes) -> Flops:
    """Count the logits of both directions, which the backward pass recomputes."""
    return replace(_all_targets(sizes), recompute=_all_targets(sizes).forward)


def _all_targets_of_ranks(sizes: LossSizes) -> Flops:
    """Count the logits of one direction, which are recomputed where targets are of many ranks."""
    return _all_targets_twice(sizes) if sizes.targets > sizes.rows else _all_targets(sizes)


def _own_and_queue(sizes: LossSizes) -> Flops:
    """Count the [N, 1 + K] logits of MoCo, whose own target is one more feature and candidate."""
    return all_pairs(sizes.rows, sizes.queue_length + 1, sizes.dim + 1, column_grad=False)


def _match_and_queue(sizes: LossSizes) -> Flops:
    """Count the search for each cell's match, which gets no gradient, and MoCo's logits."""
    matching = linear(sizes.rows, sizes.cell_dim, sizes.cells).forward_only
    return matching + _own_and_queue(sizes)


def _both_views(sizes: LossSizes) -> Flops:
    """Count the [2 N, 2 M] logits of NT-Xent, whose gradient has two products."""
    return linear(2 * sizes.rows, sizes.dim, 2 * sizes.targets)


def _decorrelation(sizes: LossSizes) -> Flops:
    """Count `ops.gaussian`'s regulariser: the [D, D] products C and Z_hat C, and the gradient's."""
    product = 2 * sizes.rows * sizes.dim**2 * sizes.decorrelates
    return Flops(2 * product, product)


def _cross_correlation(sizes: LossSizes) -> Flops:
    """Count the [D, D] product of both views, and its gradient by each that gets one."""
    product = 2 * sizes.rows * sizes.dim**2
    return Flops(product, product * (1 + sizes.target_grad))


def _two_covariances(sizes: LossSizes) -> Flops:
    """Count the [D, D] covariance of each view; a view's rows are both factors of its product."""
    product = 2 * sizes.rows * sizes.dim**2
    return Flops(2 * product, 2 * product * (1 + sizes.target_grad))


def _running_form(sizes: LossSizes) -> Flops:
    """Count Z_hat F and its gradient; F gets none."""
    product = 2 * sizes.rows * sizes.dim**2
    return Flops(product, product)


def _running_update(sizes: LossSizes) -> Flops:
    """Count the [D, D] products of both views, once for the first step's F and once for later."""
    return Flops(4 * 2 * sizes.rows * sizes.dim**2)


NUM_SINKHORN = 3
"""Iterations of Sinkhorn-Knopp."""


def _teacher_and_student(sizes: LossSizes) -> Flops:
    """Count the [N, K] logits of both, whose gradient is computed in the forward pass."""
    product = 2 * sizes.rows * sizes.targets * sizes.dim
    return Flops(2 * product, 2 * product)


def _mean_assignment(sizes: LossSizes) -> Flops:
    """Count also the student's logits for their mean softmax, once more in the backward pass."""
    mean = linear(sizes.rows, sizes.dim, sizes.targets).recomputed()
    return _teacher_and_student(sizes) + mean


def _sinkhorn(sizes: LossSizes) -> Flops:
    """Count the teacher's logits, which each iteration computes."""
    return Flops(NUM_SINKHORN * 2 * sizes.assigned * sizes.targets * sizes.dim)


def _neighbours(sizes: LossSizes) -> Flops:
    """Count the [N, N] products of rows, by which neighbours are found without a gradient."""
    return Flops(2 * sizes.rows**2 * sizes.dim)


def _slices(sizes: LossSizes) -> Flops:
    """Count the projections on random directions, which get no gradient."""
    product = 2 * sizes.rows * sizes.dim * sizes.slices
    return Flops(product, product)


# ---- The table -----------------------------------------------------------------------------------

SOFTMAX = "-log exp(z_hat . z / tau) / sum_z' exp(z_hat . z' / tau)"
SLICES = (
    "mean over random unit a of N int |mean_n exp(i t a . z_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt"
)
_BUILDERS = "m3i_fast.objectives.losses.builders"
LOSSES: dict[LossKey, Loss] = {
    ("category", "boltzmann", "negatives"): Loss(
        formula=f"{SOFTMAX}, z' all categories, rows of unit length, tau learnt",
        build=f"{_BUILDERS}:category",
        flops=_all_targets,
        independent=True,
        over_ranks=True,
    ),
    ("caption", "boltzmann", "negatives"): Loss(
        formula=f"mean of both directions of {SOFTMAX}, z' captions of the batch, tau learnt",
        build=f"{_BUILDERS}:caption",
        flops=_all_targets_twice,
        over_ranks=True,
        takes_counts=True,
    ),
    ("caption", "sigmoid", "negatives"): Loss(
        formula="1/N sum over pairs of log(1 + exp(-y (z_hat . z / tau + b))), y = 1 for a picture "
        "and its caption, else -1; tau, b learnt",
        build=f"{_BUILDERS}:caption_sigmoid",
        flops=_all_targets,
        over_ranks=True,
        takes_counts=True,
    ),
    ("caption_tokens", "boltzmann", "negatives"): Loss(
        formula="-log exp(z_hat . z) / sum_z' exp(z_hat . z'), z' all tokens of the vocabulary, "
        "the mean over tokens",
        build=f"{_BUILDERS}:category",
        flops=_all_targets,
        over_ranks=True,
    ),
    ("grounded_caption", "boltzmann", "negatives"): Loss(
        formula="-log exp(z_hat . z) / sum_z' exp(z_hat . z'), z' all words and coordinates, the "
        "mean over tokens of boxes and their texts",
        build=f"{_BUILDERS}:category",
        flops=_all_targets,
        over_ranks=True,
    ),
    ("referring_box", "boltzmann", "negatives"): Loss(
        formula="-log exp(z_hat . z) / sum_z' exp(z_hat . z'), z' all words and coordinates, the "
        "mean over tokens of texts and their boxes",
        build=f"{_BUILDERS}:category",
        flops=_all_targets,
        over_ranks=True,
    ),
    ("labels", "sigmoid", "negatives"): Loss(
        formula="mean over labels of log(1 + exp(-y z_hat)), y = 1 for those that the picture has, "
        "else -1",
        build=f"{_BUILDERS}:labels",
        flops=no_products,
        independent=True,
        over_ranks=True,
    ),
    ("numbers", "gaussian", "fixed"): Loss(
        formula="|z_hat - z|^2 / (2 sigma^2), the mean over known numbers, z less its mean in the "
        "data, over its standard deviation",
        build=f"{_BUILDERS}:numbers",
        flops=no_products,
        over_ranks=True,
    ),
    ("pixels", "gaussian", "fixed"): Loss(
        formula="|z_hat - z|^2 / (2 sigma^2 E), z the pixels of a patch less their mean, over "
        "their standard deviation",
        build=f"{_BUILDERS}:dense_gaussian",
        flops=no_products,
        independent=True,
    ),
    ("features", "gaussian", "stop_gradient"): Loss(
        formula="|z_hat - LN(sg(z))|^2 / (2 sigma^2 E)",
        build=f"{_BUILDERS}:dense_gaussian",
        flops=no_products,
        independent=True,
    ),
    ("features", "gaussian", "decorrelation"): Loss(
        formula="(|z_hat - LN(sg(z))|^2 / (2 sigma^2) + w z_hat^T C z_hat) / E, "
        "C = mean of LN(z) LN(z)^T",
        build=f"{_BUILDERS}:dense_gaussian",
        flops=_decorrelation,
    ),
    ("features", "gaussian", "covariance"): Loss(
        formula="(|z_hat - LN(sg(z))|^2 / (2 sigma^2) + w z_hat^T C z_hat) / E, "
        "C = covariance of LN(z)",
        build=f"{_BUILDERS}:dense_gaussian",
        flops=_decorrelation,
    ),
    ("features", "cosine_smooth_l1", "stop_gradient"): Loss(
        formula="0.9 (1 - cos(z_hat, sg(z))) + 0.1 smooth_l1(z_hat - sg(z))",
        build=f"{_BUILDERS}:cosine_smooth_l1",
        flops=no_products,
        independent=True,
    ),
    ("features", "boltzmann", "queue"): Loss(
        formula=f"{SOFTMAX}, z the target cell whose features are most alike, z' it and a queue",
        build=f"{_BUILDERS}:dense_queue",
        flops=_match_and_queue,
    ),
    ("gram", "gaussian", "stop_gradient"): Loss(
        formula="sum_ij (z_hat_ij - sg(z)_ij)^2 / n^2 of n cells, z_ij the cosine of cells i and j",
        build=f"{_BUILDERS}:squared_distance",
        flops=no_products,
        independent=True,
    ),
    ("embedding", "boltzmann", "queue"): Loss(
        formula=f"{SOFTMAX}, z' the own target and a queue of earlier ones, rows of unit length",
        build=f"{_BUILDERS}:queue",
        flops=_own_and_queue,
        takes_counts=True,
    ),
    ("embedding", "boltzmann", "negatives"): Loss(
        formula=f"{SOFTMAX}, z' targets of the batch, rows of unit length",
        build=f"{_BUILDERS}:batch_negatives",
        flops=_all_targets_of_ranks,
        over_ranks=True,
        takes_counts=True,
    ),
    ("embedding", "boltzmann", "all_views"): Loss(
        formula=f"{SOFTMAX}, z' both views of the batch but the row itself, rows of unit length",
        build=f"{_BUILDERS}:all_views",
        flops=_both_views,
        over_ranks=True,
        takes_counts=True,
    ),
    ("embedding", "gaussian", "stop_gradient"): Loss(
        formula="-cos(z_hat, sg(z)): |z_hat - z|^2 / 2 of unit rows, less a constant",
        build=f"{_BUILDERS}:cosine",
        flops=no_products,
        independent=True,
    ),
    ("embedding", "gaussian", "cross_correlation"): Loss(
        formula="sum_i (1 - C_ii)^2 + 0.005 sum_{i != j} C_ij^2, C the correlation of both views",
        build=f"{_BUILDERS}:cross_correlation",
        flops=_cross_correlation,
        over_ranks=True,
    ),
    ("embedding", "gaussian", "variance_covariance"): Loss(
        formula="25 |z_hat - z|^2 / E + 25 mean of both views' max(0, 1 - std) + sum of both "
        "views' off-diagonal covariance^2 / E",
        build=f"{_BUILDERS}:variance_covariance",
        flops=_two_covariances,
        over_ranks=True,
    ),
    ("embedding", "gaussian", "running_correlation"): Loss(
        formula="-z_hat . sg(z) + 50 z_hat^T F z_hat, F a running mean of z z^T, rows of unit "
        "length",
        build=f"{_BUILDERS}:running_correlation",
        flops=_running_form,
        flops_once=_running_update,
    ),
    ("prototypes", "boltzmann", "centring"): Loss(
        formula="-sum_k p_k log softmax(z_hat / tau)_k, p = softmax((z - c) / 0.04), "
        "c a running mean",
        build=f"{_BUILDERS}:centring",
        flops=_teacher_and_student,
        over_ranks=True,
    ),
    ("prototypes", "boltzmann", "sinkhorn"): Loss(
        formula="-sum_k p_k log softmax(z_hat / tau)_k, p = Sinkhorn-Knopp(z / 0.05)",
        build=f"{_BUILDERS}:sinkhorn",
        flops=_teacher_and_student,
        flops_once=_sinkhorn,
        over_ranks=True,
    ),
    ("prototypes", "boltzmann", "joint_sinkhorn"): Loss(
        formula="-sum_k p_k log softmax(z_hat / tau)_k, p = Sinkhorn-Knopp(z / 0.04) over the rows "
        "of all target views",
        build=f"{_BUILDERS}:joint_sinkhorn",
        flops=_teacher_and_student,
        flops_once=_sinkhorn,
        over_ranks=True,
    ),
    ("prototypes", "boltzmann", "mean_entropy"): Loss(
        formula="-sum_k p_k log softmax(z_hat / tau)_k + log K - H(mean softmax(z_hat / tau)), p = "
        "Sinkhorn-Knopp(log softmax(4 z / tau))",
        build=f"{_BUILDERS}:mean_entropy",
        flops=_mean_assignment,
        flops_once=_sinkhorn,
        over_ranks=True,
    ),
    ("summary", "none", "koleo"): Loss(
        formula="-mean log |z - nearest other z of the view|, rows of unit length",
        build=f"{_BUILDERS}:nearest_neighbour",
        flops=_neighbours,
    ),
    ("summary", "none", "sigreg"): Loss(
        formula=f"{SLICES}, z of the view",
        build=f"{_BUILDERS}:gaussian_slices",
        flops=_slices,
        over_ranks=True,
    ),
    ("mean_embedding", "gaussian", "sigreg"): Loss(
        formula=f"(1 - w) |z_hat - z|^2 / E + w ({SLICES}, z_hat of each view)",
        build=f"{_BUILDERS}:views_and_slices",
        flops=_slices,
        over_ranks=True,
    ),
}
LOSSES |= {
    ("cell_prototypes", *key[1:]): row for key, row in LOSSES.items() if key[0] == "prototypes"
}
