"""The compiled ops of boltzmann on vectors of N and M, each against float64 arithmetic of torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.ops.boltzmann_vectors import num_parts
from m3i_fast.ops.library import m3i

pytestmark = pytest.mark.usefixtures("kernel")

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
WIDE = (FP32, FP64)
# N, M: nothing, less than a part, several of them, more than a block's threads.
SIZES = ((0, 0), (0, 3), (1, 1), (33, 70), (300, 41))


def random(*shape: int, dtype: torch.dtype = FP64) -> Tensor:
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=rng, dtype=FP64).to(dtype)


def close(ours: Tensor, truth: Tensor, ulps: float = 8.0) -> None:
    """Within units in the last place of each element."""
    rtol = ulps * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), truth.double(), rtol=rtol, atol=0, equal_nan=True)


# ---- Ids, bias, bound ----------------------------------------------------------------------------


def prepare(z_hat: Tensor, z: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`boltzmann_prepare` of one process, by names."""
    call = {"bias": None, "row_ids": None, "col_ids": None, "first_column": 0} | given
    return m3i.boltzmann_prepare.default(z_hat, z, **{"num_columns": None} | call)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("width", [0, 5, 16, 72])
def test_extremes_are_those_of_rows_that_count(dtype: torch.dtype, width: int) -> None:
    wide = FP64 if dtype == FP64 else FP32
    for rows, columns in SIZES:
        z_hat, z = random(rows, width).to(dtype), random(columns, width + 1)[:, :width].to(dtype)
        targets = torch.arange(rows) % max(columns, 1)
        targets[torch.arange(rows) % 5 == 2] = -1
        bias = random(columns, dtype=wide)
        bias[torch.arange(columns) % 7 == 4] = -torch.inf
        made = prepare(z_hat, z.contiguous(), bias=bias, row_ids=targets)
        row_ids, col_ids, own_bias, extremes = made
        assert row_ids.dtype == torch.int32 and torch.equal(row_ids.long(), targets)
        assert col_ids.shape == (0,) and torch.equal(own_bias, bias)
        assert extremes.shape == (num_parts(rows, columns), 4) and extremes.dtype == wide
        there, counts = bias != -torch.inf, targets != -1
        longest = (
            z_hat.double()[counts].norm(dim=1),
            z.double()[there].norm(dim=1),
            bias.double()[there].abs(),
        )
        truth = [float(sizes.max()) if len(sizes) else 0.0 for sizes in longest]
        close(extremes[:, :3].amax(0), torch.tensor(truth, dtype=FP64))
        assert int(extremes[:, 3].sum()) == int(counts.sum())


def test_what_is_not_finite_reaches_the_bound() -> None:
    for value, where in itertools.product((torch.nan, torch.inf, -torch.inf), (0, 199)):
        z_hat, z, bias = random(200, 24, dtype=FP32), random(200, 24, dtype=FP32), torch.zeros(200)
        broken = z_hat.clone()
        broken[where, 3] = value
        for features in ((broken, z), (z, broken)):
            extremes = prepare(*features)[3]
            _, _, bound, run = m3i.boltzmann_shift.default(extremes, torch.tensor(2.0), bias, bias)
            assert not bound.isfinite() and not run
        bias[where] = value
        assert bool(prepare(z_hat, z, bias=bias)[3].isfinite().all()) == (value == -torch.inf)


def test_a_bias_of_all_columns_is_expanded() -> None:
    z = random(40, 8, dtype=FP32)
    bias = prepare(z, z, bias=torch.tensor(-2.5))[2]
    assert torch.equal(bias, torch.full((40,), -2.5))
    assert torch.equal(prepare(z, z)[2], torch.zeros(40))


def test_rows_count_from_the_ranks_first_column() -> None:
    z = random(40, 8, dtype=FP32)
    row_ids = prepare(z, z, first_column=7, num_columns=60)[0]
    assert row_ids.tolist() == list(range(7, 47))


def numbered(ids: list[int]) -> dict[int, int]:
    """The first place of each id."""
    return {number: place for place, number in reversed(list(enumerate(ids)))}


@pytest.mark.parametrize("columns", [1, 33, 700])
def test_ids_become_the_first_column_that_has_them(columns: int) -> None:
    """Those whose slots of the table collide, too: 700 random ones do."""
    few = [2**63 - 1, -(2**63), 0, -5, -1, 2**32, 2**32 - 1]
    rng = torch.Generator().manual_seed(columns)
    col_ids = torch.randint(-(2**62), 2**62, (columns,), generator=rng).tolist()
    col_ids[1::3] = [few[i % len(few)] for i in range(len(col_ids[1::3]))]
    row_ids = [*few, *reversed(col_ids), 12345]
    first = numbered(col_ids)
    z_hat, z = random(len(row_ids), 4, dtype=FP32), random(columns, 4, dtype=FP32)
    ids = {"row_ids": torch.tensor(row_ids), "col_ids": torch.tensor(col_ids)}
    ours_rows, ours_cols, bias, extremes = prepare(z_hat, z, **ids)
    assert ours_rows.tolist() == [-1 if i == -1 else first.get(i, columns) for i in row_ids]
    assert ours_cols.tolist() == [-2 if i == -1 else first[i] for i in col_ids]
    assert torch.equal(bias == -torch.inf, ids["col_ids"] == -1)
    assert int(extremes[:, 3].sum()) == sum(i != -1 for i in row_ids)


def test_columns_of_other_ranks_have_ids_too() -> None:
    """The bias is of this rank's columns alone, the fourth and fifth of six."""
    z = random(2, 4, dtype=FP32)
    ids = {"row_ids": torch.tensor([9, 7]), "col_ids": torch.tensor([7, 7, 8, -1, 9, 9])}
    row_ids, col_ids, bias, _ = prepare(z, z, **ids, first_column=3, num_columns=6)
    assert row_ids.tolist() == [4, 0] and col_ids.tolist() == [0, 0, 2, -2, 4, 4]
    assert bias.tolist() == [-torch.inf, 0.0]


@pytest.mark.parametrize("wrong", [5, -2, 2**32, -(2**63)])
def test_a_target_of_no_column_is_refused(wrong: int) -> None:
    z_hat, z = random(40, 4, dtype=FP32), random(5, 4, dtype=FP32)
    targets = torch.zeros(40, dtype=torch.int64)
    targets[33] = wrong
    with pytest.raises(RuntimeError, match=rf"from 0 to 4, .* got {wrong} in place 33|__trap"):
        prepare(z_hat, z, row_ids=targets)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("scale", [0.0, 14.3, -100.0, 5000.0])
def test_shift(dtype: torch.dtype, scale: float) -> None:
    extremes, one = random(70, 4, dtype=dtype).abs(), torch.tensor(scale, dtype=dtype)
    row, column, bias, _ = extremes.double().amax(0)
    truth = abs(scale) * row * column + bias
    lengths = torch.empty(300, dtype=torch.int32), extremes.new_empty(5)
    headroom, common = (600, 2000) if dtype == FP64 else (60, 200)
    row_shift, col_shift, bound, run = m3i.boltzmann_shift.default(extremes, one, *lengths)
    close(bound, truth)
    assert bool(run) == bool(truth <= common)
    for shift, length in ((row_shift, 300), (col_shift, 5)):
        expected = (bound - headroom).clamp_min(0)
        assert torch.equal(shift, expected.expand(length))


# ---- Which sums hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("which", ["rows", "cols"])
def test_a_sum_out_of_range_asks_for_exact_shifts(dtype: torch.dtype, which: str) -> None:
    least = 1e-290 if dtype == FP64 else 1e-30
    yes, no = torch.tensor(True), torch.tensor(False)
    good = {"rows": torch.ones(4, 2100, dtype=dtype), "cols": torch.ones(4, 1030, dtype=dtype)}
    assert not m3i.boltzmann_exact.default(*good.values(), yes)
    assert m3i.boltzmann_exact.default(*good.values(), no)
    assert not m3i.boltzmann_exact.default(good["rows"], good["cols"][:, :0].contiguous(), yes)
    for place, value in itertools.product((0, 1029), (0.0, least / 3, torch.inf, torch.nan)):
        bad = {name: sums.clone() for name, sums in good.items()}
        bad[which][:2, place] = value
        assert m3i.boltzmann_exact.default(*bad.values(), yes), (place, value)
        bad[which][3, place] = 0  # without a positive: nothing is divided by it
        assert not m3i.boltzmann_exact.default(*bad.values(), yes), (place, value)


def test_exact_shifts_are_the_maxima() -> None:
    row_max, col_max = random(300, dtype=FP32), random(41, dtype=FP32)
    row_max[7] = col_max[40] = -torch.inf  # nothing to compare with
    shifts = torch.full((300,), 3.0), torch.full((41,), 3.0)
    op = m3i.boltzmann_exact_shift.default
    for exact, expected in ((False, shifts), (True, (row_max, col_max))):
        ours = op(row_max, col_max, *shifts, torch.tensor(exact))
        for shift, wanted in zip(ours, expected, strict=True):
            assert torch.equal(shift, wanted.masked_fill(wanted == -torch.inf, 0))


# ---- Loss and weights ----------------------------------------------------------------------------


@dataclass
class Pairs:
    """All logits of a small call, in float64."""

    logits: Tensor  # [N, M]
    positive: Tensor  # [N, M] bool
    shift: float

    def sums(self, dim: int, dtype: torch.dtype) -> Tensor:  # [4, N] or [4, M]
        likely = (self.logits - self.shift).exp()
        kinds = (
            likely.masked_fill(self.positive, 0),
            likely.masked_fill(~self.positive, 0),
            self.logits.masked_fill(~self.positive, 0),
            self.positive.double(),
        )
        return torch.stack([kind.sum(dim) for kind in kinds]).to(dtype)

    def losses(self, logits: Tensor, dim: int) -> Tensor:  # [N] or [M]
        """-log softmax, the mean over the positives of a row; 0 without one."""
        unlikely = -logits.log_softmax(dim).masked_fill(~self.positive, 0)
        return -(-unlikely).sum(dim) / self.positive.sum(dim).clamp_min(1)


def make_pairs(rows: int, columns: int) -> Pairs:
    """Rows and columns of none, one and several positives, of which some are nearly certain."""
    logits = random(rows, columns) * 4
    positive = torch.arange(rows)[:, None] % 9 == torch.arange(columns) % 11
    positive[:: max(rows // 3, 1)] = False
    logits[:, ::2] += 12 * positive[:, ::2]
    return Pairs(logits, positive, shift=2.0)


def loss_of(pairs: Pairs, dtype: torch.dtype, symmetric: bool, mean: bool, *, again: bool) -> Any:
    """What both ops return; again: the sums that count are the second ones."""
    rows, cols = pairs.sums(1, dtype), pairs.sums(0, dtype)
    cols = cols if symmetric else cols[:, :0].contiguous()
    twice = (rows * torch.nan, cols * torch.nan, rows, cols) if again else (rows, cols, None, None)
    shifts = (torch.full((n,), pairs.shift, dtype=dtype) for n in pairs.logits.shape)
    sums = *twice, *shifts, torch.tensor(again)
    totals = m3i.boltzmann_totals.default(*sums)
    bound = torch.tensor(50.0, dtype=dtype)
    return m3i.boltzmann_loss.default(*sums, totals, bound, symmetric, mean, 3)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("symmetric", "mean"), [*itertools.product((True, False), repeat=2)])
def test_loss_and_its_gradient(dtype: torch.dtype, symmetric: bool, mean: bool) -> None:
    """The value is torch's, and the weights make of exponentials its gradient by the logits."""
    for again, (rows, columns) in enumerate(((1, 1), (40, 33), (290, 300))):
        pairs = make_pairs(rows, columns)
        if rows == 1:
            pairs.positive[:] = True
        value, share, num_rows, row_weights, col_weights = loss_of(
            pairs, dtype, symmetric, mean, again=again == 1
        )
        logits = pairs.logits.clone().requires_grad_()
        counts = [max(int(pairs.positive.any(dim).sum()), 1) if mean else 1 for dim in (1, 0)]
        half = 0.5 if symmetric else 1.0
        truth = half * pairs.losses(logits, 1).sum() / counts[0]
        if symmetric:
            truth = truth + half * pairs.losses(logits, 0).sum() / counts[1]
        close(value, truth.detach(), 64)
        assert float(num_rows) == int(pairs.positive.any(1).sum())
        close(share, torch.tensor(3 * half / counts[0], dtype=FP64))
        likely = (pairs.logits - pairs.shift).exp()
        by_row, by_col = row_weights.double()[:, :, None], col_weights.double()[:, None, :]
        gradient = torch.where(
            pairs.positive,
            likely * (by_row[1] + by_col[1]) - by_row[2] - by_col[2],
            likely * (by_row[0] + by_col[0]),
        )
        (expected,) = torch.autograd.grad(truth, logits)
        error = (gradient * half / counts[0] - expected).norm() / expected.norm().clamp_min(1e-300)
        assert float(error) < 64 * torch.finfo(dtype).eps
        assert symmetric or not col_weights.any()


def test_a_rank_without_rows_counts_the_columns_of_all() -> None:
    """Its rows' sums are empty, and the columns' second ones hold as elsewhere."""
    cols, shift = make_pairs(40, 33).sums(0, FP32), torch.full((33,), 2.0)
    none = cols[:, :0].contiguous()
    for first, again, exact in ((cols, None, False), (cols * torch.nan, cols, True)):
        twice = (None, None) if again is None else (none, again)
        sums = none, first, *twice, shift[:0], shift, torch.tensor(exact)
        loss = m3i.boltzmann_totals.default(*sums)[:, 2].sum()
        truth = make_pairs(40, 33)
        close(loss, truth.losses(truth.logits, 0).sum(), 64)


@pytest.mark.parametrize("dtype", WIDE)
def test_a_converged_pair_keeps_its_precision(dtype: torch.dtype) -> None:
    """Of losses down to 1e-300 and their gradients all places are right."""
    odds = torch.logspace(-30 if dtype == FP32 else -300, 0, 300, dtype=FP64).to(dtype)
    one, shift = torch.ones_like(odds), torch.zeros_like(odds)
    rows = torch.stack([odds, one, one * 0, one])
    sums = rows, rows[:, :0].contiguous(), None, None, shift, shift[:5], torch.tensor(False)
    totals = m3i.boltzmann_totals.default(*sums)
    bound = torch.zeros((), dtype=dtype)
    _, _, _, row_weights, _ = m3i.boltzmann_loss.default(*sums, totals, bound, False, False, 1)
    close(row_weights[2], odds.double() / (1 + odds.double()))
    for place in (0, 150, 299):
        of_one = rows[:, place : place + 1].contiguous()
        sums = of_one, of_one[:, :0].contiguous(), None, None, shift[:1], shift[:1], sums[-1]
        totals = m3i.boltzmann_totals.default(*sums)
        close(totals[:, 0].sum(), odds[place].double().log1p())


def test_a_bound_that_is_not_finite_spoils_the_value() -> None:
    ones = torch.ones(4, 3)
    sums = ones, ones, None, None, ones[0], ones[0], torch.tensor(False)
    totals = m3i.boltzmann_totals.default(*sums)
    for bound in (torch.inf, torch.nan):
        end = totals, torch.tensor(bound)
        assert m3i.boltzmann_loss.default(*sums, *end, True, True, 1)[0].isnan()
        of_sigmoid = m3i.boltzmann_sigmoid_loss.default(ones[0], totals, end[1], True, 1)
        assert of_sigmoid[0].isnan()


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("mean", [True, False])
def test_sigmoid_loss(dtype: torch.dtype, mean: bool) -> None:
    for rows in (0, 1, 2100):
        values, extremes = random(rows, dtype=dtype).abs(), torch.zeros(70, 4, dtype=dtype)
        extremes[: min(rows, 70), 3] = 4.0
        count = 4 * min(rows, 70)
        bound = torch.tensor(3.0, dtype=dtype)
        value, share = m3i.boltzmann_sigmoid_loss.default(values, extremes, bound, mean, 2)
        divisor = max(count, 1) if mean else 1
        close(value, values.double().sum() / divisor, 64)
        close(share, torch.tensor(2 / divisor, dtype=FP64))


# ---- Backward ------------------------------------------------------------------------------------

# Sizes of both gradients: nothing, a vector and its rest, more than a grid's first round.
ELEMENTS = ((0, 0), (1, 7), (1030, 0), (4096, 2049))


@pytest.mark.parametrize(
    ("given", "dtype"),
    [(FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP16), (FP32, FP32), (FP64, FP64)],
)
def test_gradients_are_scaled_and_rounded_once(given: torch.dtype, dtype: torch.dtype) -> None:
    wide = FP64 if dtype == FP64 else FP32
    for (of_z_hat, of_z), optional in itertools.product(ELEMENTS, (True, False)):
        grads = random(of_z_hat).to(given), random(of_z).to(given)
        grad_out, share, scale, by_scale = (torch.tensor(x, dtype=wide) for x in (3, 0.1, -7, 0.3))
        bias = random(of_z, dtype=wide)
        factors = (share, scale) if optional else (None, None)
        factor, z_hat, z, scaled, biases = m3i.boltzmann_scale.default(
            grad_out, *factors, *grads, by_scale, bias, dtype
        )
        shared = grad_out * share if optional else grad_out
        expected = shared * scale if optional else shared
        assert torch.equal(factor, expected)
        assert torch.equal(z_hat, (grads[0].to(wide) * expected).to(dtype))
        assert torch.equal(z, (grads[1].to(wide) * expected).to(dtype))
        assert torch.equal(scaled, by_scale * shared) and torch.equal(biases, bias * shared)


# ---- All of them ---------------------------------------------------------------------------------


def calls() -> dict[Any, list[tuple[Any, ...]]]:
    """Arguments of each op, some of those that are optional left out."""
    z_hat, z, ids = random(70, 9, dtype=FP32), random(41, 9, dtype=FP32), torch.arange(70) - 1
    yes, one = torch.tensor(True), torch.tensor(1.5)
    sums = make_pairs(70, 41).sums(1, FP32), make_pairs(70, 41).sums(0, FP32)
    shifts = torch.full((70,), 2.0), torch.full((41,), 2.0)
    both = [(*sums, None, None, *shifts, yes), (*sums, *sums, *shifts, yes)]
    parts = random(5, 4, dtype=FP32)
    ops = torch.ops.m3i
    return {
        ops.boltzmann_prepare.default: [
            (z_hat, z_hat, None, None, None, 0, None),
            (z_hat, z.bfloat16().float(), one, ids % 41, None, 0, 41),
            (z_hat, z, random(41, dtype=FP32), ids, ids[:41].clone(), 0, 41),
        ],
        ops.boltzmann_shift.default: [(parts, one, ids, shifts[1])],
        ops.boltzmann_exact.default: [(*sums, yes)],
        ops.boltzmann_exact_shift.default: [(*shifts, *shifts, yes)],
        ops.boltzmann_totals.default: both,
        ops.boltzmann_loss.default: [(*of, parts, one, True, True, 2) for of in both],
        ops.boltzmann_sigmoid_loss.default: [(shifts[0], parts, one, True, 2)],
        ops.boltzmann_scale.default: [
            (one, one, None, z_hat, z, one, shifts[1], torch.bfloat16),
            (one, None, one, z_hat.half(), z.half(), one, shifts[1][:0], torch.float16),
        ],
    }


def test_opcheck() -> None:
    for op, arguments in calls().items():
        for call in arguments:
            torch.library.opcheck(op, call)


def test_runs_repeat_bit_for_bit() -> None:
    for op, arguments in calls().items():
        for call in arguments:
            one, other = op(*call), op(*call)
            pairs = [(one, other)] if isinstance(one, Tensor) else zip(one, other, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), op


WRONG: dict[str, tuple[Any, str]] = {
    "row_ids": (
        lambda a: prepare(a, a, row_ids=torch.zeros(3, dtype=torch.int32)),
        "row_ids: expected dtype int64, got int32",
    ),
    "rows of ids": (
        lambda a: prepare(a, a, row_ids=torch.zeros(2, dtype=torch.int64)),
        r"row_ids: expected shape \[3\], got \[2\]",
    ),
    "col_ids alone": (
        lambda a: prepare(a, a, col_ids=torch.zeros(3, dtype=torch.int64)),
        "row_ids: expected beside col_ids, got none",
    ),
    "place": (lambda a: prepare(a, a, first_column=1), "first_column, num_columns: expected"),
    "bias": (
        lambda a: prepare(a, a, bias=torch.zeros(2)),
        r"bias: expected shape \[3\], got \[2\]",
    ),
    "extremes": (
        lambda a: m3i.boltzmann_shift.default(a, torch.tensor(1.0), a[0], a[0]),
        r"extremes: expected shape \[\*, 4\], got \[3, 5\]",
    ),
    "wide": (
        lambda a: m3i.boltzmann_shift.default(a, torch.tensor(1), a[0], a[0]),
        "scale: expected dtype float32 or float64, got int64",
    ),
    "sums": (
        lambda a: m3i.boltzmann_exact.default(a, a, torch.tensor(True)),
        r"rows: expected shape \[4, \*\], got \[3, 5\]",
    ),
    "flag": (
        lambda a: m3i.boltzmann_exact.default(a[:0].new_empty(4, 1), a.new_empty(4, 1), a[0, 0]),
        "run: expected dtype bool, got float32",
    ),
    "narrower": (
        lambda a: m3i.boltzmann_scale.default(
            a[0, 0], None, None, a.double(), a.double(), a[0, 0], a[0], torch.float16
        ),
        "dtype: expected that of grad_z_hat, .* got float16 of float64",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(random(3, 5, dtype=FP32))
