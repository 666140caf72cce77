"""Calls of boltzmann's three compiled ops, and their definitions on arrays of all logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops.library import m3i
from tests.shared.tolerance import assert_as_accurate

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (BF16, FP16, FP32, FP64)
MODES = ("shared", "exact", "sigmoid")

# How often torch's error in wide arithmetic, and how many units in the last place of the largest
# value beyond it. On CUDA float32 is multiplied as pairs of tf32 numbers: 2^-21 of a dot product is
# lost at most, which the scale of 14.3 multiplies in the exponent.
ALLOWED = {
    BF16: {"times": 2.0, "ulps": 4.0},
    FP16: {"times": 2.0, "ulps": 4.0},
    FP32: {"times": 2.0, "ulps": 32.0},
    FP64: {"times": 2.0, "ulps": 16.0},
}


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return FP64 if dtype == FP64 else FP32


@dataclass(frozen=True, slots=True)
class Call:
    """What the ops take, and what a softmax over rows and columns would."""

    z_hat: Tensor  # [N, D]
    z: Tensor  # [M, D]
    scale: Tensor  # [] wide
    bias: Tensor  # [M] wide
    row_ids: Tensor  # [N] int32
    col_ids: Tensor | None  # [M] int32
    row_shift: Tensor  # [N] wide
    col_shift: Tensor  # [M] wide
    row_weights: Tensor  # [3, N] wide
    col_weights: Tensor  # [3, M] wide
    mode: str

    @property
    def block(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.z_hat, self.z, self.scale, self.bias, self.row_ids

    def maxima(self, run: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return m3i.boltzmann_maxima.default(*self.block, run)

    def sums(self, symmetric: bool = True, run: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flags = self.mode == "exact", symmetric, self.mode == "sigmoid"
        shifts = self.row_shift, self.col_shift
        return m3i.boltzmann_sums.default(*self.block, self.col_ids, *shifts, *flags, run)

    def grads(self, needs_grad: tuple[bool, bool, bool] = (True, True, True)) -> list[Tensor]:
        exact = torch.tensor(self.mode == "exact")
        return list(
            m3i.boltzmann_grads.default(
                *(*self.block, self.col_ids, self.row_shift, self.col_shift, exact),
                *(self.row_weights, self.col_weights, self.mode == "sigmoid", list(needs_grad)),
            )
        )


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, mode: str, labels: bool, scale: float = 14.3
) -> Call:
    """With ignored rows and columns, and rows without a positive.

    labels: ids of columns, several of each; otherwise columns are counted, and some are the
    positives of several rows.
    """
    rows, columns, width = shape
    rng = torch.Generator().manual_seed(sum(shape))
    wide = wide_of(dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=FP64)

    num_ids = max(2, columns // 3) if labels else columns
    row_ids = torch.randint(num_ids, (rows,), generator=rng, dtype=torch.int32)
    row_ids[torch.arange(rows) % 7 == 3] = -1
    ignored = torch.arange(columns) % 11 == 5
    if not labels:  # their logits, -inf, would be a row's positives
        row_ids[(row_ids >= 0) & ignored[row_ids]] = -1
    col_ids = torch.randint(num_ids, (columns,), generator=rng, dtype=torch.int32)
    call = Call(
        F.normalize(normal(rows, width), dim=1).to(dtype),
        F.normalize(normal(columns, width), dim=1).to(dtype),
        torch.tensor(scale, dtype=wide),
        normal(columns).to(wide).masked_fill(ignored, -torch.inf),
        row_ids,
        col_ids.masked_fill(ignored, -2) if labels else None,
        *(torch.full((n,), scale - 10, dtype=wide) for n in (rows, columns)),
        *(torch.rand((3, n), generator=rng, dtype=FP64).to(wide) for n in (rows, columns)),
        mode,
    )
    if mode == "exact":
        row_max, col_max = (
            most.to(wide).masked_fill(most == -torch.inf, 0) for most in true_maxima(call)
        )
        call = replace(call, row_shift=row_max, col_shift=col_max)
    return call


# ---- The definitions, in `dtype` arithmetic ------------------------------------------------------


def logits(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """C and Z."""
    dots = call.z_hat.to(dtype) @ call.z.to(dtype).T
    return dots, call.scale.to(dtype) * dots + call.bias.to(dtype)


def pairs(call: Call) -> tuple[Tensor, Tensor]:
    """Which elements are positive, and which belong to a row that is not ignored."""
    columns = call.col_ids if call.col_ids is not None else torch.arange(len(call.z))
    there = (call.row_ids != -1)[:, None].expand(-1, len(call.z))
    return (call.row_ids[:, None] == columns) & there, there


def true_maxima(call: Call, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor]:
    z = logits(call, dtype)[1].masked_fill(~pairs(call)[1], -torch.inf)
    return z.amax(1), z.amax(0)


def exponentials(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """E of the rows and of the columns."""
    z = logits(call, dtype)[1]
    row_shift, col_shift = call.row_shift.to(dtype), call.col_shift.to(dtype)
    return (z - row_shift[:, None]).exp(), (z - col_shift).exp()


def true_sums(call: Call, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor]:
    z = logits(call, dtype)[1]
    positive, there = pairs(call)
    negative = there & ~positive
    if call.mode == "sigmoid":
        softplus = F.softplus(torch.where(positive, -z, z)).masked_fill(~there, 0)
        rows = softplus.new_zeros(4, len(z))
        rows[0], rows[3] = softplus.sum(1), positive.sum(1)
        cols = softplus.new_zeros(4, z.shape[1])
        cols[3] = positive.sum(0)
        return rows, cols

    def four(e: Tensor, dim: int) -> Tensor:
        kinds = e.masked_fill(~negative, 0), e.masked_fill(~positive, 0)
        return torch.stack([*(k.sum(dim) for k in (*kinds, z.masked_fill(~positive, 0))),
                            positive.sum(dim).to(dtype)])  # fmt: skip

    by_row, by_col = exponentials(call, dtype)
    return four(by_row, 1), four(by_col, 0)


def true_grads(call: Call, dtype: torch.dtype = FP64, rounded: bool = False) -> list[Tensor]:
    """rounded: both products take G rounded to the features' dtype."""
    dots, z = logits(call, dtype)
    positive, there = pairs(call)
    if call.mode == "sigmoid":
        grad = torch.where(positive, -torch.sigmoid(-z), torch.sigmoid(z))
        values = true_sums(call, dtype)[0][0]
    else:
        by_row, by_col = exponentials(call, dtype)
        rows, cols = call.row_weights.to(dtype)[:, :, None], call.col_weights.to(dtype)
        grad = torch.where(
            positive,
            by_row * rows[1] + by_col * cols[1] - rows[2] - cols[2],
            by_row * rows[0] + by_col * cols[0],
        )
        values = dots.new_empty(0)
    grad = grad.masked_fill(~there, 0)
    product = grad.to(call.z.dtype).to(dtype) if rounded else grad
    return [
        product @ call.z.to(dtype),
        product.T @ call.z_hat.to(dtype),
        (grad * dots).sum(),
        grad.sum(0),
        values,
    ]


# ---- Comparison ----------------------------------------------------------------------------------


def assert_all_as_accurate(
    ours: list[Tensor], torchs: list[Tensor], truth: list[Tensor], call: Call, names: str
) -> None:
    for name, our, its, true in zip(names.split(), ours, torchs, truth, strict=True):
        allowed = ALLOWED[call.z.dtype]
        try:
            for row in range(len(our)) if our.dim() == 2 and len(our) == 4 else (...,):
                assert_as_accurate(our[row], its[row], true[row], **allowed)
        except AssertionError as error:
            shape = [*call.z_hat.shape, len(call.z)]
            raise AssertionError(f"{name} of {shape}, {call.mode}: {error}") from error
