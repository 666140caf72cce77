"""The three compiled ops of boltzmann, each against float64 arithmetic on all of its logits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.shared.ops.boltzmann_kernel_cases import (
    ALLOWED,
    BF16,
    DTYPES,
    FP32,
    FP64,
    MODES,
    Call,
    assert_all_as_accurate,
    make,
    true_grads,
    true_maxima,
    true_sums,
    wide_of,
)
from tests.shared.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("kernel")

# N, M, D: less than a tile, more than one, and widths that no vector divides.
SHAPES = ((1, 1, 1), (2, 5, 3), (33, 130, 17), (130, 129, 72), (257, 140, 24), (70, 300, 129))


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
    call.row_ids[0] = 130  # of no column, which nobody sees
    call.sums(run=no)


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
    for one, two in zip(
        [*call.sums(), *call.grads()], [*other.sums(), *other.grads()], strict=True
    ):
        assert torch.equal(one, two)


def test_ignored_rows_may_hold_anything() -> None:
    call = make((33, 130, 17), BF16, "shared", labels=False)
    garbage = call.z_hat.masked_fill((call.row_ids == -1)[:, None], torch.nan)
    other = replace(call, z_hat=garbage)
    for one, two in zip(
        [*call.maxima(), *call.sums()], [*other.maxima(), *other.sums()], strict=True
    ):
        assert torch.equal(one, two)
