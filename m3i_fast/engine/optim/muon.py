"""Muon, as torch.optim.Muon, with matrices of one shape multiplied together and in fp32 on a CPU.

torch's own Muon multiplies one matrix after another, in bf16 on every device. On a CPU without bf16
units (most laptops) that takes ten to thirty times as long as fp32; on a GPU the launches take the
time.
"""

# N: matrices of one shape, M x K as they are, R x C with the short side first.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from m3i_fast.engine.optim.skippable_step import device_of, split_by_size

Coefficients = tuple[float, float, float]


class Muon(torch.optim.Muon):
    """Muon: steps by the orthogonalised momentum (Jordan 2024; arXiv 2502.16982).

    b = lerp(b, g, 1 - momentum);  u = lerp(g, b, momentum)
    w = (1 - lr decay) w - lr sqrt(max(1, rows / columns)) orthogonalise(u)

    Groups, defaults and state are those of torch.optim.Muon, so either reads a checkpoint of the
    other.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], *, lr: float, weight_decay: float
    ) -> None:
        # The number of iterations is fixed: iterating on Gram matrices is stable for five.
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step on all matrices that have a gradient; a closure is refused."""
        assert closure is None, "closure: expected none, since the gradients are computed already"
        for group in self.param_groups:
            by_shape: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape, p.dtype, p.device].append(p)
            for params in by_shape.values():
                for bounded in split_by_size(params):  # bounds the memory of one batched product
                    self._update(group, bounded)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update `params`, which have one shape, in place."""
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group({**group, "params": params}, [], grads, momenta)
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_lerp_(momenta, grads, 1 - momentum)
        dtype = matmul_dtype(device_of(params[0]))
        directions_NMK = orthogonalise(
            torch.stack(torch._foreach_lerp(grads, momenta, momentum)).to(dtype),
            group["ns_coefficients"],
            group["ns_steps"],
            eps=group["eps"],
        )
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        rows, columns = params[0].shape
        rate = lr * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(params, directions_NMK.to(params[0].dtype).unbind(), alpha=-rate)


def matmul_dtype(device: torch.device) -> torch.dtype:
    """Return fp32 for a CPU, which may have no units for bf16, and bf16 for all else."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def orthogonalise(
    matrices_NMK: Tensor,  # [N, M, K] fp32 or bf16
    coefficients: Coefficients,
    num_steps: int,
    *,
    eps: float,
) -> Tensor:  # [N, M, K] in the same dtype
    """Bring all singular values of each matrix near 1 by Newton-Schulz iterations.

    X = X / |X|, then num_steps times  X = a X + b (X X^T) X + c (X X^T)^2 X
    """
    is_tall = matrices_NMK.shape[1] > matrices_NMK.shape[2]
    x_NRC = matrices_NMK.mT if is_tall else matrices_NMK
    norms_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True)
    x_NRC = x_NRC / norms_N11.clamp(min=eps)
    iterate = _on_gram_matrices if x_NRC.dtype == torch.float32 else _on_matrices
    x_NRC = iterate(x_NRC, coefficients, num_steps)
    return x_NRC.mT.contiguous() if is_tall else x_NRC


def _on_matrices(x_NRC: Tensor, coefficients: Coefficients, num_steps: int) -> Tensor:
    """Iterate as the formula says, with 2 R R C + R R R multiply-adds an iteration."""
    a, b, c = coefficients
    for _ in range(num_steps):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC


def _on_gram_matrices(x_NRC: Tensor, coefficients: Coefficients, num_steps: int) -> Tensor:
    """Iterate on G = X X^T alone: F = a + b G + c G^2 takes X to F X and G to F G F.

    The long side takes part in two products in all instead of two an iteration, which is 0.6 of the
    multiply-adds over the matrices of a Transformer block. It needs fp32: an eigenvalue of G that
    rounds to below 0 grows by a factor of 12 an iteration, which after five of them is still far
    below the rounding of bf16.
    """
    a, b, c = coefficients
    gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
    product_NRR: Tensor | None = None
    for step in range(num_steps):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=1, dim2=2).add_(a)
        product_NRR = factor_NRR if product_NRR is None else factor_NRR @ product_NRR
        if step < num_steps - 1:
            gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
    return x_NRC if product_NRR is None else torch.bmm(product_NRR, x_NRC)
