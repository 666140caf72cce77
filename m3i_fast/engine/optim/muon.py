"""Muon, as torch.optim.Muon, with many matrices multiplied together, and in fp32 on a CPU.

torch's own Muon multiplies one matrix after another, in bf16 on every device. On a CPU without bf16
units (most laptops) that takes ten to thirty times as long as fp32; on a GPU the launches take the
time.
"""

# N: matrices of one stack, M x K as they are, R x C with the short side first.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m3i_fast.engine.optim.skippable_step import (
    descend_unless,
    device_of,
    lerp_unless,
    split_by_size,
)
from m3i_fast.engine.parallel.local_shards import is_sharded, local

Coefficients = tuple[float, float, float]

# Elements of matrices that are padded to one shape: their products take less time than launches.
_MAX_PADDED = 2**22


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

    _step_supports_amp_scaling = True  # `found_inf` is the flag of `step_with_skip`

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step on all matrices that have a gradient; a closure is refused."""
        assert closure is None, "closure: expected none, since the gradients are computed already"
        for group in self.param_groups:
            for params in _together([p for p in group["params"] if p.grad is not None]):
                self._update(group, params, getattr(self, "found_inf", None))

    def _update(self, group: dict[str, Any], params: list[Tensor], skip: Tensor | None) -> None:
        """Update `params`, whose short sides are equal, in place unless skip [] fp32 is 1."""
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        self._init_group({**group, "params": params}, [], grads, momenta)
        lr, momentum = group["lr"], group["momentum"]
        lerp_unless(skip, local(momenta), local(grads), 1 - momentum)
        updates = torch._foreach_lerp(grads, momenta, momentum)
        indices_of = _by_shape(updates)
        stacks = [torch.stack([updates[i] for i in of]) for of in indices_of.values()]
        del grads, updates
        directions = orthogonalise_all(
            stacks,
            group["ns_coefficients"],
            group["ns_steps"],
            eps=group["eps"],
            dtype=matmul_dtype(device_of(params[0])),
        )
        for ((rows, columns), of), stack in zip(indices_of.items(), directions, strict=True):
            own = [params[i] for i in of]
            each = stack.to(own[0].dtype).contiguous().unbind()
            shards = [_sharded_as(p, d) for p, d in zip(own, each, strict=True)]
            scale = max(1.0, rows / columns) ** 0.5
            decay = group["weight_decay"] / scale
            descend_unless(skip, local(own), shards, lr * scale, weight_decay=decay)


def _together(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split parameters into lists of bounded size that are iterated on together.

    The short sides of each list are equal. Those of sharded parameters are whole shapes: DTensor
    has no rule for what follows.
    """
    alike: defaultdict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        sides = tuple(p.shape) if is_sharded(p) else min(p.shape)
        alike[sides, p.dtype, p.device].append(p)
    for those in alike.values():
        yield from split_by_size(those)  # bounds the memory of one batched product


def _by_shape(tensors: Sequence[Tensor]) -> dict[tuple[int, int], list[int]]:
    """Return the indices of the tensors of each shape."""
    indices: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        rows, columns = tensor.shape
        indices[rows, columns].append(index)
    return dict(indices)


def _sharded_as(parameter: Tensor, direction: Tensor) -> Tensor:
    """Return this rank's shard of a direction, or all of it where the parameter is not sharded."""
    if not is_sharded(parameter):
        return direction
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shard: Tensor = direction.redistribute(mesh, placements).to_local()  # type: ignore[attr-defined]
    return shard.contiguous()


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
    dtype = matrices_NMK.dtype
    (result_NMK,) = orthogonalise_all([matrices_NMK], coefficients, num_steps, eps=eps, dtype=dtype)
    return result_NMK.contiguous()


def orthogonalise_all(
    stacks: Sequence[Tensor],  # [N, M, K] each, of one short side
    coefficients: Coefficients,
    num_steps: int,
    *,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:  # [N, M, K] each, of `dtype`, in any strides
    """Return `orthogonalise` of each stack in `dtype`, with the iterations of all in one product.

    In fp32 these are on Gram matrices, which have one shape. In bf16 short sides are padded to one
    shape with zeros, which the iterations keep, where products are shorter than their launches.
    """
    is_tall = [stack.shape[1] > stack.shape[2] for stack in stacks]
    wide = [stack.mT if tall else stack for stack, tall in zip(stacks, is_tall, strict=True)]
    lengths, longest = [len(x) for x in wide], max(x.shape[2] for x in wide)
    if dtype == torch.float32:
        results = _on_gram_matrices([_unit(x, eps) for x in wide], coefficients, num_steps)
    elif len(wide) > 1 and sum(lengths) * wide[0].shape[1] * longest <= _MAX_PADDED:
        padded_NRC = wide[0].new_zeros(sum(lengths), wide[0].shape[1], longest, dtype=dtype)
        for part, x in zip(padded_NRC.split(lengths), wide, strict=True):
            part[:, :, : x.shape[2]] = x
        iterated = _on_matrices(_unit(padded_NRC, eps), coefficients, num_steps).split(lengths)
        results = [part[:, :, : x.shape[2]] for part, x in zip(iterated, wide, strict=True)]
    else:
        results = [_on_matrices(_unit(x.to(dtype), eps), coefficients, num_steps) for x in wide]
    return [x.mT if tall else x for x, tall in zip(results, is_tall, strict=True)]


def _unit(x_NRC: Tensor, eps: float) -> Tensor:
    norms_N11 = torch.linalg.vector_norm(x_NRC, dim=(1, 2), keepdim=True)
    return x_NRC / norms_N11.clamp(min=eps)


def _on_matrices(x_NRC: Tensor, coefficients: Coefficients, num_steps: int) -> Tensor:
    """Iterate as the formula says, with 2 R R C + R R R multiply-adds an iteration."""
    a, b, c = coefficients
    for _ in range(num_steps):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, factor_NRR, x_NRC, beta=a)
    return x_NRC


def _on_gram_matrices(
    stacks: Sequence[Tensor],  # [N, R, C] each, of one R
    coefficients: Coefficients,
    num_steps: int,
) -> list[Tensor]:
    """Iterate on G = X X^T alone: F = a + b G + c G^2 takes X to F X and G to F G F.

    The long side takes part in two products in all instead of two an iteration, which is 0.6 of the
    multiply-adds over the matrices of a Transformer block. It needs fp32: an eigenvalue of G that
    rounds to below 0 grows by a factor of 12 an iteration, which after five of them is still far
    below the rounding of bf16.
    """
    a, b, c = coefficients
    if num_steps == 0:
        return list(stacks)
    grams = [torch.bmm(x_NRC, x_NRC.mT) for x_NRC in stacks]
    gram_NRR = torch.cat(grams) if len(grams) > 1 else grams[0]
    product_NRR: Tensor | None = None
    for step in range(num_steps):
        factor_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        factor_NRR.diagonal(dim1=1, dim2=2).add_(a)
        product_NRR = factor_NRR if product_NRR is None else factor_NRR @ product_NRR
        if step < num_steps - 1:
            gram_NRR = factor_NRR @ gram_NRR @ factor_NRR
    assert product_NRR is not None
    products = product_NRR.split([len(x) for x in stacks]) if len(grams) > 1 else [product_NRR]
    return [torch.bmm(product, x) for product, x in zip(products, stacks, strict=True)]
