"""Linear probe: multinomial logistic regression on frozen, standardised features.

Legend: N items, D feature width, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearProbe:
    weight: Tensor  # [C, D] fp64
    bias: Tensor  # [C] fp64
    mean: Tensor  # [D] fp64, of the training features
    scale: Tensor  # [D] fp64, their standard deviation; 1 where they do not vary

    def logits(self, features: Tensor) -> Tensor:  # [M, D] -> [M, C] fp64
        return F.linear((features.double() - self.mean) / self.scale, self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:  # [M, D] -> [M] int64
        return self.logits(features).argmax(1)


def fit_linear(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N] int64
    *,
    l2: float,
    start: LinearProbe | None = None,
    max_iterations: int = 1000,
) -> LinearProbe:
    """Minimise mean_i(-log softmax(W x_i + b)[label_i]) + l2 / 2 * ||W||^2 by L-BFGS in fp64.

    The bias is not penalised, so l2 = 1 / (N * C) of scikit-learn's LogisticRegression. `start`, a
    probe of the same features, saves iterations along a path of l2. Raises ValueError when l2 <= 0
    and RuntimeError when the gradient has not vanished after `max_iterations`.
    """
    if l2 <= 0:
        raise ValueError(f"l2: expected > 0 (a separable set has no optimum at 0), got {l2}")
    features = features.double()
    mean = features.mean(0)
    scale = features.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))
    rows = (features - mean) / scale
    num_classes = int(labels.max()) + 1
    weight = start.weight.clone() if start else rows.new_zeros(num_classes, rows.shape[1])
    bias = start.bias.clone() if start else rows.new_zeros(num_classes)
    with torch.enable_grad():
        _minimise(rows, labels, weight.requires_grad_(), bias.requires_grad_(), l2, max_iterations)
    return LinearProbe(weight.detach(), bias.detach(), mean, scale)


def _minimise(
    rows: Tensor,  # [N, D] fp64
    labels: Tensor,  # [N]
    weight: Tensor,  # [C, D] fp64, updated in place
    bias: Tensor,  # [C] fp64, updated in place
    l2: float,
    max_iterations: int,
) -> None:
    tolerance = 1e-7
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0.0,  # stop on the gradient alone: a small step is not an optimum
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(rows, weight, bias), labels)
        loss = loss + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(loss_and_gradient)
    loss_and_gradient()
    largest = max(float(p.grad.abs().max()) for p in (weight, bias) if p.grad is not None)
    if not largest <= 100 * tolerance:
        raise RuntimeError(
            f"linear probe: L-BFGS stopped after {max_iterations} iterations with a gradient of "
            f"{largest:.2g}, expected at most {100 * tolerance:.0g}; l2 = {l2}"
        )
