"""The three compiled ops of boltzmann, each against float64 arithmetic on all of its logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from m3i_fast.ops.library import m3i
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("kernel")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (BF16, FP16, FP32, FP64)
MODES = ("shared", "exact", "sigmoid")

# N, M, D: less than a tile, more than one, and widths that no vector divides.
SHAPES = ((1, 1, 1), (2, 5, 3), (33, 130, 17), (130, 129, 72), (257, 140, 24), (70, 300, 129))

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


# ---- Tests ---------------------------------------------------------------------------------------


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


def calls(dtype: torch.dtype, mode: str) -> Iterator[Call]:
    for shape, labels in itertools.product(SHAPES, (False, True)):
        yield make(shape, dtype, mode, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maxima(dtype: torch.dtype) -> None:
    for call in calls(dtype, "shared"):
        truth = list(true_maxima(call))
        torchs = list(true_maxima(call, wide_of(dtype)))
        for our, its, true in zip(call.maxima(), torchs, truth, strict=True):
            assert torch.equal(our == -torch.inf, true == -torch.inf)
            there = true.isfinite()
            assert_as_accurate(our[there], its[there], true[there], **ALLOWED[dtype])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype: torch.dtype, mode: str) -> None:
    for call in calls(dtype, mode):
        torchs = list(true_sums(call, wide_of(dtype)))
        assert_all_as_accurate(list(call.sums()), torchs, list(true_sums(call)), call, "rows cols")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grads(dtype: torch.dtype, mode: str) -> None:
    for call in calls(dtype, mode):
        torchs = true_grads(call, wide_of(dtype), rounded=True)
        names = "grad_z_hat grad_z grad_scale grad_bias values"
        assert_all_as_accurate(call.grads(), torchs, true_grads(call), call, names)


def test_columns_that_nobody_asked_for_are_empty() -> None:
    for mode in MODES:
        call = make((33, 130, 17), BF16, mode, labels=True)
        rows, cols = call.sums(symmetric=False)
        assert cols.shape == (4, 0)
        assert torch.equal(rows, call.sums()[0])


@pytest.mark.parametrize("needs_grad", list(itertools.product((False, True), repeat=3)))
def test_gradients_that_nobody_asked_for_are_empty(needs_grad: tuple[bool, bool, bool]) -> None:
    call = make((40, 130, 17), FP32, "shared", labels=False)
    grads, of_all = call.grads(needs_grad), call.grads()
    asked = (*needs_grad[:2], True, needs_grad[2])
    for grad, of_them, wanted in zip(grads[:4], of_all[:4], asked, strict=True):
        assert torch.equal(grad, of_them) if wanted else grad.shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_runs_repeat_bit_for_bit(mode: str) -> None:
    call = make((140, 150, 40), BF16, mode, labels=True)
    for first, second in zip(
        [*call.sums(), *call.grads(), *call.maxima()],
        [*call.sums(), *call.grads(), *call.maxima()],
        strict=True,
    ):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [BF16, FP64])
@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 3), (4, 5, 0)])
def test_nothing_to_add(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    full = make((max(shape[0], 1), max(shape[1], 1), 3), dtype, "shared", labels=False)
    n, m, d = shape
    call = replace(
        full,
        z_hat=full.z_hat[:n, :d].contiguous(),
        z=full.z[:m, :d].contiguous(),
        bias=full.bias[:m],
        row_ids=full.row_ids[:n] if m else full.row_ids[:n].fill_(-1),
        row_shift=full.row_shift[:n],
        col_shift=full.col_shift[:m],
        row_weights=full.row_weights[:, :n].contiguous(),
        col_weights=full.col_weights[:, :m].contiguous(),
    )
    if n and m:
        torchs = [list(f(call, wide_of(dtype))) for f in (true_sums, true_grads)]
        truth = list(true_sums(call)), list(true_grads(call))
        assert_all_as_accurate(list(call.sums()), torchs[0], truth[0], call, "rows cols")
        names = "grad_z_hat grad_z grad_scale grad_bias values"
        assert_all_as_accurate(call.grads(), torchs[1], truth[1], call, names)
        return
    row_max, col_max = call.maxima()
    assert torch.equal(row_max, torch.full_like(row_max, -torch.inf)) and len(row_max) == n
    assert torch.equal(col_max, torch.full_like(col_max, -torch.inf)) and len(col_max) == m
    for result in [*call.sums(), *call.grads()]:
        assert torch.equal(result, torch.zeros_like(result))


def test_where_run_is_false_nothing_is_done(kernel: str) -> None:
    call = make((33, 130, 17), BF16, "shared", labels=False)
    yes, no = torch.tensor(True), torch.tensor(False)
    for op in (call.maxima, lambda run: call.sums(run=run)):
        assert all(map(torch.equal, op(run=yes), op(run=None)))
        skipped = op(run=no)
        if kernel != "cpu":  # memory that is not written is NaN there
            assert all(result.isnan().all() for result in skipped)


@pytest.mark.parametrize("row_id", [-2, 130, 2**31 - 1])
def test_a_row_of_no_column_is_refused(row_id: int) -> None:
    call = make((33, 130, 17), BF16, "shared", labels=False)
    call.row_ids[32] = row_id
    for op in (call.sums, call.grads):
        with pytest.raises(RuntimeError, match=r"targets: .* got|__trap\(\)"):
            op()


def test_ids_of_labels_may_be_larger_than_the_columns_number() -> None:
    call = make((33, 130, 17), FP32, "shared", labels=True)
    renamed = torch.tensor([2**31 - 1, 10**9, 130, 2**30], dtype=torch.int32)
    assert call.col_ids is not None

    def rename(ids: Tensor) -> Tensor:
        return torch.where((ids >= 0) & (ids < 4), renamed[ids.clamp(0, 3)], ids)

    other = replace(call, row_ids=rename(call.row_ids), col_ids=rename(call.col_ids))
    for one, two in zip([*call.sums(), *call.grads()], [*other.sums(), *other.grads()], strict=True):
        assert torch.equal(one, two)


def test_ignored_rows_may_hold_anything() -> None:
    call = make((33, 130, 17), BF16, "shared", labels=False)
    garbage = call.z_hat.masked_fill((call.row_ids == -1)[:, None], torch.nan)
    other = replace(call, z_hat=garbage)
    for one, two in zip([*call.maxima(), *call.sums()], [*other.maxima(), *other.sums()], strict=True):
        assert torch.equal(one, two)
