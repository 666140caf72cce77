"""Cases of the op `boltzmann`, and what it is held to in each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.ops import boltzmann, reference

FP32, FP64, HALVES = torch.float32, torch.float64, (torch.bfloat16, torch.float16)

# Positive pairs, and what else distinguishes a call.
KINDS = (
    "diagonal",
    "rows alone",
    "classes",
    "classes with bias",
    "ids",
    "sigmoid",
    "sigmoid, ids",
)


@dataclass(frozen=True, slots=True)
class Case:
    kind: str
    rows: int
    columns: int
    width: int
    scale: float = 14.3
    align: float = 0.5
    """Share of the target in its prediction; 1: they are equal."""
    length: float = 1.0
    """Of the rows."""
    gap: float = 0.0
    """Of a direction that all rows have and all columns have negated: the modality gap."""

    def __str__(self) -> str:
        return f"{self.kind}-{self.rows}x{self.columns}x{self.width}-{self.scale}"


@dataclass(frozen=True, slots=True)
class Call:
    """Tensors in float64; those that need a gradient come first."""

    tensors: dict[str, Tensor]  # z_hat, z, scale and perhaps bias
    options: dict[str, Any]

    def run(
        self,
        function: Callable[..., Tensor],
        dtype: torch.dtype,
        *,
        device: str = "cpu",
        **more: Any,
    ) -> dict[str, Tensor]:
        """The value and all gradients in float64; features in `dtype`, the others wide."""
        wide = FP64 if dtype == FP64 else FP32
        leaves = {
            name: tensor.to(device, dtype if name in ("z_hat", "z") else wide).requires_grad_()
            for name, tensor in self.tensors.items()
        }
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        given = dict(leaves)
        value = function(given.pop("z_hat"), given.pop("z"), given.pop("scale"), **given,
                         **options, **more)  # fmt: skip
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        return {"value": value.detach().cpu().double()} | {
            name: grad.cpu().double() for name, grad in zip(leaves, grads, strict=True)
        }


def make(case: Case, dtype: torch.dtype = FP64) -> Call:
    """In float64, of numbers that `dtype` holds."""
    rng = torch.Generator().manual_seed(hash((case.rows, case.columns, case.width)) % 2**31)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=FP64)

    z = F.normalize(random(case.columns, case.width), dim=1)
    own = torch.arange(case.rows) % case.columns
    noise = F.normalize(random(case.rows, case.width), dim=1)
    z_hat = F.normalize(case.align * z[own] + (1 - case.align) * noise, dim=1)
    apart = F.normalize(random(case.width), dim=0) * case.gap
    z_hat, z = (F.normalize(x, dim=1) * case.length for x in (z_hat + apart, z - apart))
    tensors = {"z_hat": z_hat.to(dtype).double(), "z": z.to(dtype).double()}
    tensors["scale"] = torch.tensor(case.scale, dtype=FP32).double()
    options: dict[str, Any] = {"form": "sigmoid"} if "sigmoid" in case.kind else {}
    if case.kind == "rows alone":
        options["symmetric"] = False
    if "classes" in case.kind:
        options["targets"] = torch.where(torch.arange(case.rows) % 5 == 3, -1, own)
    if "ids" in case.kind:
        # several positives a row and a column, some of neither, some ignored
        count = max(2, case.columns // 2)
        rows, columns = own % count, torch.arange(case.columns) % count
        options["row_ids"] = (10**12 + 7 * rows).masked_fill(torch.arange(case.rows) % 7 == 3, -1)
        options["col_ids"] = (10**12 + 7 * columns).masked_fill(
            torch.arange(case.columns) % 6 == 4, -1
        )
        options["row_ids"][case.rows // 2] = -5  # of nobody
    if case.kind == "classes with bias":
        tensors["bias"] = random(case.columns).float().double()
    if "sigmoid" in case.kind:
        tensors["bias"] = torch.tensor(-4.5, dtype=FP64)
    return Call(tensors, options)


def leaves(case: Case) -> list[Tensor]:
    """z_hat, z, scale and perhaps the bias, in float32, each to be differentiated by."""
    tensors = make(case, FP32).tensors
    return [tensor.float().requires_grad_() for tensor in tensors.values()]


def shapes(kind: str) -> Iterator[tuple[int, int, int]]:
    """Ragged, from 1 to 1,025."""
    rows = (1, 2, 33, 130, 257)
    widths = (1, 3, 8, 17, 64, 130, 1025)
    square = kind in ("diagonal", "rows alone", "sigmoid")
    for i, (n, width) in enumerate(itertools.product(rows, widths)):
        yield n, n if square else (5, 40, 129, 300)[i % 4], width


def grid() -> Iterator[Case]:
    for kind in KINDS:
        for i, shape in enumerate(shapes(kind)):
            yield Case(kind, *shape, scale=(1.0, 14.3, 50.0, 100.0)[i % 4])


HARD = {
    "one pair": Case("diagonal", 1, 1, 16),
    # the positive has a probability of 1 - 1e-7 or more
    "converged": Case("diagonal", 64, 64, 64, scale=30.0, align=0.95),
    "converged, scale 100": Case("diagonal", 64, 64, 64, scale=100.0, align=0.8),
    "converged classes": Case("classes", 64, 40, 64, scale=50.0, align=1.0),
    "converged ids": Case("ids", 64, 64, 64, scale=50.0, align=0.95),
    "all alike": Case("diagonal", 40, 40, 8, align=0.0, gap=30.0),
    # every cosine is near -1, and the largest logit 200 below the largest possible
    "modality gap": Case("diagonal", 70, 70, 32, scale=100.0, gap=10.0),
    "modality gap, ids": Case("ids", 70, 75, 32, scale=100.0, gap=10.0),
    "long rows": Case("diagonal", 70, 70, 32, scale=10.0, length=4.0),
    "very long rows": Case("classes", 70, 33, 32, scale=1.0, length=30.0),
    "scale -5": Case("diagonal", 33, 33, 16, scale=-5.0),
    "scale 0": Case("diagonal", 33, 33, 16, scale=0.0),
    "tiles, several": Case("diagonal", 2500, 2500, 24),
    "tiles, several, ids": Case("ids", 1300, 4200, 16),
    "tiles, several, sigmoid": Case("sigmoid", 2500, 2500, 16),
}


def errors(got: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Frobenius norm of what is wrong."""
    return {name: float((got[name] - truth[name]).norm()) for name in truth}


def assert_right(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Errors at most twice those of torch's own graph in that type, and a few last places.

    In float64, which is the truth's own type, and for what vanishes, the last places are all.
    """
    call = make(case, dtype)
    truth = call.run(reference.boltzmann, FP64)
    ours = call.run(boltzmann, dtype, device=device)
    torchs = errors(call.run(reference.boltzmann, dtype, device=device), truth)
    largest = abs(case.scale) * case.length**2 + 5
    for name, error in errors(ours, truth).items():
        size = float(truth[name].norm())
        wide = torch.finfo(FP64 if dtype == FP64 else FP32)
        rounding = torch.finfo(dtype).eps if name in ("z_hat", "z") else wide.eps
        # The logits are rounded once, to the wide type; the truth is rounded too.
        places = (4 * rounding + largest * wide.eps) * size
        floor = (largest + size) * max(case.columns, 64) * torch.finfo(FP64).eps
        if name != "value":  # a sum whose terms cancel
            floor += 8 * wide.eps * largest * case.length / case.rows**0.5
        allowed = 2 * torchs[name] + places + floor
        assert error <= allowed, f"{name}: {error:.3g} of {size:.3g}, torch {torchs[name]:.3g}"
