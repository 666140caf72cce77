"""Linear probe: multinomial logistic regression on frozen, standardised features.

Legend: N items, D feature width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 1e-6  # of the gradient; below it the line search measures only rounding
ROUNDS = 4  # of L-BFGS at most; what ends in the first has the bits of a single one


@dataclass(frozen=True, slots=True)
class LinearProbe:
    """A fitted linear classifier of standardised features."""

    weight: Tensor  # [C, D] fp64
    bias: Tensor  # [C] fp64
    mean: Tensor  # [D] fp64, of the training features
    scale: Tensor  # [D] fp64, their standard deviation; 1 where they do not vary

    def logits(self, features: Tensor) -> Tensor:  # [M, D] -> [M, C] fp64
        """Return the logits of features."""
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:  # [M, D] -> [M] int64
        """Return the class with the largest logit."""
        return self.logits(features).argmax(1)


def fit_linear(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    *,
    l2: float,
    start: LinearProbe | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = 1000,
) -> LinearProbe:
    """Minimise mean_i(-log softmax(W x_i + b)[label_i]) + l2 / 2 * ||W||^2 by L-BFGS in fp64.

    The bias is not penalised, so l2 is 1 / (N * C) of scikit-learn's LogisticRegression. start: a
    probe of the same features, which saves iterations along a path of l2. Raises ValueError when l2
    <= 0, and RuntimeError when an entry of the gradient is above ten tolerances after ROUNDS times
    `max_iterations`; a round that ends below them is the last.
    """
    if l2 <= 0:
        raise ValueError(f"l2: expected > 0 (a separable set has no optimum at 0), got {l2}")
    features = features.double()
    mean = features.mean(0)
    scale = features.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    rows = (features - mean) / scale
    num_classes = int(labels.max()) + 1
    weight = start.weight if start else rows.new_zeros(num_classes, rows.shape[1])
    bias = start.bias.clone() if start else rows.new_zeros(num_classes)
    basis, variance = _principal_axes(rows)
    # Approximate curvature of the loss along each axis, for a softmax that is even at first. With
    # axes scaled by it, L-BFGS needs tens of steps for correlated features and not hundreds.
    curvature = variance / num_classes + l2
    stretch = curvature.sqrt()
    turned = weight @ basis * stretch
    shrunk = rows @ basis / stretch  # W x = turned shrunk, for the W that is returned
    solver = torch.optim.LBFGS(
        [turned, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0.0,  # stop on the gradient alone: a small step is not an optimum
        line_search_fn="strong_wolfe",
    )
    for _ in range(ROUNDS):
        slope = _minimise(solver, shrunk, labels, turned, bias, l2 / curvature)
        if slope <= 10 * tolerance:
            break
    else:
        raise RuntimeError(
            f"linear probe: L-BFGS stopped after {ROUNDS * max_iterations} iterations with a "
            f"gradient of {slope:.2g}, expected at most {10 * tolerance:.0g}; l2 = {l2}"
        )
    return LinearProbe((turned / stretch) @ basis.T, bias, mean, scale)


def _principal_axes(rows: Tensor) -> tuple[Tensor, Tensor]:  # [N, D] of mean 0 -> [D, K], [K]
    """Return orthonormal axes that span all rows, and so the optimal W; the variance along each."""
    num, dim = rows.shape
    if num < dim:
        _, singular, axes = torch.linalg.svd(rows, full_matrices=False)
        return axes.T, singular.square() / num
    variance, axes = torch.linalg.eigh(rows.T @ rows / num)
    return axes, variance.clamp_min(0)


def _minimise(
    solver: torch.optim.LBFGS,
    rows: Tensor,  # [N, K] fp64
    labels: Tensor,  # [N]
    weight: Tensor,  # [C, K] fp64, updated in place
    bias: Tensor,  # [C] fp64, updated in place
    ridge: Tensor,  # [K] fp64, the penalty of each column of the weight
) -> float:
    """Minimise in place and return the largest entry of the gradient that is left."""
    weight.grad, bias.grad = torch.empty_like(weight), torch.empty_like(bias)
    share = F.one_hot(labels, len(weight)).to(rows) / len(rows)

    def loss_and_gradient() -> Tensor:  # in closed form: autograd took twice the time
        log_p = torch.addmm(bias, rows, weight.T).log_softmax(1)
        shrinkage = weight * ridge
        loss = 0.5 * (weight * shrinkage).sum() - (log_p * share).sum()
        error = log_p.exp() / len(rows) - share
        torch.addmm(shrinkage, error.T, rows, out=weight.grad)
        torch.sum(error, 0, out=bias.grad)
        return loss

    solver.step(loss_and_gradient)
    loss_and_gradient()
    return float(torch.cat([weight.grad.flatten(), bias.grad]).abs().max())
