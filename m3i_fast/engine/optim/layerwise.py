"""LAMB and LARS in plain torch: the step of each tensor is scaled by its norm, also when sharded.

A parameter group with `decays` False has neither weight decay nor a layer-wise scale. It holds
biases and norms, as in the papers' implementations (here: all tensors of one dimension or less),
and the tables of positions and tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from m3i_fast.engine.optim.skippable_step import split_by_size
from m3i_fast.engine.parallel.local_shards import local

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Tensors = list[Tensor] | tuple[Tensor, ...]


class Layerwise(torch.optim.Optimizer, ABC):
    """Base of LAMB and LARS, which updates this rank's local shards, a bounded number at a time."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step on all parameters that have a gradient; a closure is refused."""
        assert closure is None, "closure: expected none, since the gradients are computed already"
        for group in self.param_groups:
            for params in split_by_size([p for p in group["params"] if p.grad is not None]):
                grads = local(p.grad for p in params if p.grad is not None)
                self.update(group, params, grads)

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update `params` in place; `grads` are this rank's local shards of their gradients."""

    def _states(self, params: list[Tensor], name: str) -> list[Tensor]:
        """Return this rank's local shards of the state named `name`, which starts as zeros."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return local(self.state[p][name] for p in params)


class Lamb(Layerwise):
    """LAMB (arXiv 1904.00962, algorithm 2) with phi(z) = z.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay x
    x = x - lr u |x| / |u|, without |x| / |u| where one of them is 0.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decays": True})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update `params` in place; `grads` are this rank's local shards of their gradients."""
        beta1, beta2 = group["betas"]
        steps = self._count(params)
        weights = local(params)
        means, squares = self._states(params, "exp_avg"), self._states(params, "exp_avg_sq")
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - beta2**steps).sqrt().unbind())
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_mul_(scales, (1 - beta1**steps).unbind())
        updates = torch._foreach_div(means, scales)
        del scales
        if group["decays"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
            weight_norms, update_norms = full_norms([weights, updates], params)
            both_nonzero = (weight_norms > 0) & (update_norms > 0)
            ratios = torch.where(both_nonzero, weight_norms / update_norms, 1.0)
            torch._foreach_mul_(updates, ratios.unbind())
        torch._foreach_add_(weights, updates, alpha=-group["lr"])

    def _count(self, params: list[Tensor]) -> Tensor:  # [N] fp64
        """Add one to each parameter's step count, on the device, where a skipped step is undone."""
        for p in params:
            self.state[p].setdefault("step", torch.zeros((), device=p.device))
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)
        return torch.stack(steps).double()


class Lars(Layerwise):
    """LARS (arXiv 1708.03888, equation 6) as SGD applies it.

    d = (g + decay w) trust |w| / (|g| + decay |w|);  v = momentum v + d;  w = w - lr v

    Where |w| or |g| is 0, d is not scaled. The paper has lr inside v. Here it is outside, as in the
    implementations for self-supervised learning, so that a change of the schedule acts at once.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**defaults, "decays": True})

    def update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        """Update `params` in place; `grads` are this rank's local shards of their gradients."""
        weights = local(params)
        velocities = self._states(params, "momentum_buffer")
        torch._foreach_mul_(velocities, group["momentum"])
        if group["decays"]:
            decay = group["weight_decay"]
            weight_norms, grad_norms = full_norms([weights, grads], params)
            both_nonzero = (weight_norms > 0) & (grad_norms > 0)
            ratios = group["trust"] * weight_norms / (grad_norms + decay * weight_norms)
            updates = torch._foreach_add(grads, weights, alpha=decay)
            torch._foreach_mul_(updates, torch.where(both_nonzero, ratios, 1.0).unbind())
            torch._foreach_add_(velocities, updates)
        else:
            torch._foreach_add_(velocities, grads)
        torch._foreach_add_(weights, velocities, alpha=-group["lr"])


def full_norms(lists: Sequence[Tensors], params: Sequence[Tensor]) -> Tensor:  # [L, N]
    """Return the Euclidean norms of whole tensors, given lists of this rank's local shards.

    `params` say how the tensors are sharded. All norms of one sharding are all-reduced together,
    where `torch.linalg.vector_norm` of a DTensor runs one collective a tensor.
    """
    # The local shard of a tensor with few rows may be empty; its norm is 0.
    squares = torch.stack([torch.stack(torch._foreach_norm(shards)) for shards in lists]).square()
    sharded: defaultdict[tuple[Any, tuple[Placement, ...]], list[int]] = defaultdict(list)
    for index, p in enumerate(params):
        if isinstance(p, DTensor):
            sharded[p.device_mesh, p.placements].append(index)
    columns = list(squares.unbind(1))
    for (mesh, placements), indices in sharded.items():
        sums = [Replicate() if place.is_replicate() else Partial() for place in placements]
        partial = torch.stack([columns[i] for i in indices])
        whole = DTensor.from_local(partial, mesh, sums, run_check=False).full_tensor()
        for i, column in zip(indices, whole.unbind(), strict=True):
            columns[i] = column
    return torch.stack(columns, 1).sqrt()
