"""Inputs of gaussian and how its results are judged, for the tests on every device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops import reference
from tests.shared.tolerance import assert_as_accurate, max_error

FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# Of prediction and target.
DTYPES = [*itertools.product((FP32, BF16, FP16), repeat=2), (FP64, FP64)]
WIDTHS = (1, 3, 8, 30, 192, 768, 1000, 1025, 2048)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    shape: tuple[int, ...] = (2, 5)
    """Without the width."""
    width: int = 30
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    sigma: float = 0.7
    normalise: bool = True
    eps: float = 1e-5
    decorrelation_weight: float = 0.0
    mean: float = 2.0
    """Of z, whose deviation is 3."""

    @property
    def options(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        names = ("sigma", "normalise", "eps", "decorrelation_weight")
        return {name: getattr(self, name) for name in names}

    @property
    def arguments(self) -> list[Any]:
        """The operator's arguments after the tensors."""
        return list(self.options.values())


def make(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """z_hat and z, the same on every device."""
    generator = torch.Generator().manual_seed(case.width)
    z_hat, z = (torch.randn(*case.shape, case.width, generator=generator) for _ in range(2))
    inputs = (z_hat, z * 3 + case.mean)
    return tuple(t.to(device, d) for t, d in zip(inputs, case.dtypes, strict=True))  # type: ignore[return-value]


def results(op: Callable[..., Tensor], z_hat: Tensor, *rest: Any, **options: Any) -> list[Tensor]:
    """Value and gradient by z_hat, of three times the value."""
    leaf = z_hat.clone().requires_grad_()
    value = op(leaf, *rest, **options)
    (grad,) = torch.autograd.grad(3 * value, leaf)
    return [value.detach(), grad]


def by_torch(
    z_hat: Tensor,
    z: Tensor,
    *,
    sigma: float,
    normalise: bool,
    eps: float,
    decorrelation_weight: float,
) -> Tensor:
    """torch's own functions, in the dtype of the arguments; SiameseIM's full product of rows."""
    if normalise:
        z = F.layer_norm(z, z.shape[-1:], eps=eps)
    z = z.to(z_hat.dtype)
    value = F.mse_loss(z_hat, z) / (2 * sigma**2)
    if not decorrelation_weight:
        return value
    p, t = z_hat.flatten(0, -2), z.flatten(0, -2)
    products = (p @ (t.T @ t / len(t)) @ p.T).diagonal()
    return value + decorrelation_weight * products.mean() / p.shape[1]


def assert_right(op: Callable[..., Tensor], case: Case, device: str = "cpu") -> None:
    """Value and gradient are no less accurate than torch's in the same types.

    A half type rounds the gradient once, and with decorrelation also t, C and its product. What
    t's rounding does to the value is a matter of chance, for torch as for us: an eighth of a unit.
    """
    inputs = make(case, device)
    ours = results(op, *inputs, **case.options)
    torchs = results(by_torch, *inputs, **case.options)
    wide = (tensor.double().cpu() for tensor in inputs)
    truth = results(reference.gaussian, *wide, **case.options)
    assert ours[0].dtype == (FP64 if case.dtypes[0] == FP64 else FP32) and not ours[0].dim()
    error, allowed = max_error(ours[0].cpu(), truth[0]), 2 * max_error(torchs[0].cpu(), truth[0])
    allowed += 4 * torch.finfo(ours[0].dtype).eps * truth[0].item()
    if case.decorrelation_weight:
        allowed += torch.finfo(case.dtypes[1]).eps / 8 * truth[0].item()
    assert error <= allowed, f"value of {case}: error {error:.3e} exceeds {allowed:.3e}"
    ulps = 8.0 if case.dtypes[0] in (FP32, FP64) else 0.5
    try:
        assert_as_accurate(ours[1].cpu(), torchs[1].cpu(), truth[1], times=2.0, ulps=ulps)
    except AssertionError as fault:
        raise AssertionError(f"gradient of {case}: {fault}") from fault
