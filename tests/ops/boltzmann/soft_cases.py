"""Calls of `boltzmann` with soft targets, and torch's expression of them, which has all logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.ops import SoftTargets, boltzmann
from tests.ops.boltzmann.cases import FP32, FP64, errors


@dataclass(frozen=True, slots=True)
class Soft:
    """A call with soft targets, in float64."""

    tensors: dict[str, Tensor]  # z_hat, z, scale and perhaps bias, which need gradients
    targets: SoftTargets

    def run(
        self,
        function: Callable[..., Tensor],
        dtype: torch.dtype,
        *,
        device: str = "cpu",
        **options: Any,
    ) -> dict[str, Tensor]:
        """Return the value and all gradients in float64; features in `dtype`, the others wide."""
        wide = FP64 if dtype == FP64 else FP32

        def cast(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if name in ("z_hat", "z") else wide)

        given = {name: cast(name, x).requires_grad_() for name, x in self.tensors.items()}
        fields = {name: getattr(self.targets, name) for name in SoftTargets.__slots__}
        targets = SoftTargets(**{
            name: None if x is None else cast(name, x) for name, x in fields.items()
        })  # fmt: skip
        value = function(**given, targets=targets, **options)
        grads = torch.autograd.grad(value, list(given.values()))
        return {"value": value.detach().cpu().double()} | {
            name: grad.cpu().double() for name, grad in zip(given, grads, strict=True)
        }


def probabilities(targets: SoftTargets) -> Tensor:  # [N, M]
    logits = targets.scale * targets.z_hat @ targets.z.T
    if targets.column_log_scale is not None:
        logits = logits + targets.column_log_scale
    return logits.softmax(1)


def by_torch(
    z_hat: Tensor,
    z: Tensor,
    scale: Tensor,
    targets: SoftTargets,
    bias: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The expression that has all logits, in wide arithmetic of rounded features."""
    wide = scale.dtype
    logits = scale * z_hat.to(wide) @ z.to(wide).T + (0 if bias is None else bias)
    columns = replace(targets, z_hat=targets.z_hat.to(wide), z=targets.z.to(wide))
    nll = F.cross_entropy(logits, probabilities(columns), reduction="none")
    if targets.row_weights is None:
        return nll.mean() if reduction == "mean" else nll.sum()
    total = (targets.row_weights * nll).sum()
    return total / targets.row_weights.sum() if reduction == "mean" else total


def soft(
    rows: int,
    columns: int,
    width: int = 24,
    *,
    scale: float = 10.0,
    target_scale: float = 25.0,
    weighted: bool = False,
    bias: bool = False,
    dtype: torch.dtype = FP64,
) -> Soft:
    """A student of unit rows, and a teacher of another width, near each other."""
    rng = torch.Generator().manual_seed(rows * columns + width)

    def unit(count: int, size: int) -> Tensor:
        rows = F.normalize(torch.randn(count, size, generator=rng, dtype=FP64), dim=1)
        return rows.to(dtype).double()

    tensors = {"z_hat": unit(rows, width), "z": unit(columns, width)}
    tensors["scale"] = torch.tensor(scale, dtype=FP64)
    if bias:
        tensors["bias"] = torch.randn(columns, generator=rng).double()
    teacher = SoftTargets(
        unit(rows, width + 7),
        unit(columns, width + 7),
        torch.tensor(target_scale, dtype=FP64),
        torch.randn(columns, generator=rng).double(),
        torch.rand(rows, generator=rng).double() + 0.1 if weighted else None,
    )
    return Soft(tensors, teacher)


def assert_soft_right(
    shape: tuple[int, int], scale: float, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Errors at most twice those of torch's graph in wide arithmetic, and a few last places."""
    rows, columns = shape
    call = soft(rows, columns, scale=scale, target_scale=2 * scale, bias=True, dtype=dtype)
    truth = call.run(by_torch, FP64)
    torchs = errors(call.run(by_torch, dtype), truth)
    for name, error in errors(call.run(boltzmann, dtype, device=device), truth).items():
        eps = torch.finfo(dtype if name in ("z_hat", "z") else FP32).eps
        places = 4 * eps * float(truth[name].norm())
        floor = 16 * torch.finfo(FP32).eps * (scale + 5) / rows**0.5
        assert error <= 2 * torchs[name] + places + floor, f"{name} of {rows} x {columns}: {error}"
