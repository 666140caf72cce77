"""The losses that a term may have: one row a loss, by target, likelihood and regulariser.

What computes each is in `m3i_fast.objectives.losses.likelihoods`, under the same key.
"""

from __future__ import annotations

from dataclasses import dataclass

LossKey = tuple[str, str, str]
"""Target, likelihood, regulariser."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What a loss minimises, and which rows it is of."""

    formula: str
    """In plain text; z carries no gradient where it says sg(z)."""
    independent: bool = False
    """Whether it is a mean over rows of a loss of each row alone, so that the gradients of several
    batches add up to that of all of them."""


SOFTMAX = "-log exp(z_hat . z / tau) / sum_z' exp(z_hat . z' / tau)"
LOSSES: dict[LossKey, Loss] = {
    ("category", "boltzmann", "negatives"): Loss(
        f"{SOFTMAX}, z' all categories, rows of unit length, tau learnt", independent=True
    ),
    ("caption", "boltzmann", "negatives"): Loss(
        f"mean of both directions of {SOFTMAX}, z' captions of the batch, tau learnt"
    ),
    ("caption", "sigmoid", "negatives"): Loss(
        "1/N sum over pairs of log(1 + exp(-y (z_hat . z / tau + b))), y = 1 for a picture and its "
        "caption, else -1; tau, b learnt"
    ),
    ("pixels", "gaussian", "fixed"): Loss(
        "|z_hat - z|^2 / (2 sigma^2 E), z the pixels of a patch less their mean, over their "
        "standard deviation",
        independent=True,
    ),
    ("features", "gaussian", "stop_gradient"): Loss(
        "|z_hat - LN(sg(z))|^2 / (2 sigma^2 E)", independent=True
    ),
    ("features", "gaussian", "decorrelation"): Loss(
        "(|z_hat - LN(sg(z))|^2 / (2 sigma^2) + w z_hat^T C z_hat) / E, C = mean of LN(z) LN(z)^T"
    ),
    ("features", "gaussian", "covariance"): Loss(
        "(|z_hat - LN(sg(z))|^2 / (2 sigma^2) + w z_hat^T C z_hat) / E, C = covariance of LN(z)"
    ),
    ("features", "boltzmann", "queue"): Loss(
        f"{SOFTMAX}, z the target cell whose features are most alike, z' it and a queue"
    ),
    ("embedding", "boltzmann", "queue"): Loss(
        f"{SOFTMAX}, z' the own target and a queue of earlier ones, rows of unit length"
    ),
    ("embedding", "boltzmann", "negatives"): Loss(
        f"{SOFTMAX}, z' targets of the batch, rows of unit length"
    ),
    ("embedding", "boltzmann", "all_views"): Loss(
        f"{SOFTMAX}, z' both views of the batch but the row itself, rows of unit length"
    ),
    ("embedding", "gaussian", "stop_gradient"): Loss(
        "-cos(z_hat, sg(z)): |z_hat - z|^2 / 2 of unit rows, less a constant", independent=True
    ),
    ("embedding", "gaussian", "cross_correlation"): Loss(
        "sum_i (1 - C_ii)^2 + 0.005 sum_{i != j} C_ij^2, C the correlation of both views"
    ),
    ("embedding", "gaussian", "variance_covariance"): Loss(
        "25 |z_hat - z|^2 / E + 25 mean of both views' max(0, 1 - std) + sum of both views' "
        "off-diagonal covariance^2 / E"
    ),
    ("embedding", "gaussian", "running_correlation"): Loss(
        "-z_hat . sg(z) + 50 z_hat^T F z_hat, F a running mean of z z^T, rows of unit length"
    ),
    ("prototypes", "boltzmann", "centring"): Loss(
        "-sum_k p_k log softmax(z_hat / tau)_k, p = softmax((z - c) / 0.04), c a running mean"
    ),
    ("prototypes", "boltzmann", "sinkhorn"): Loss(
        "-sum_k p_k log softmax(z_hat / tau)_k, p = Sinkhorn-Knopp(z / 0.05)"
    ),
    ("prototypes", "boltzmann", "mean_entropy"): Loss(
        "-sum_k p_k log softmax(z_hat / tau)_k + log K - H(mean softmax(z_hat / tau)), p = "
        "Sinkhorn-Knopp(log softmax(4 z / tau))"
    ),
}
