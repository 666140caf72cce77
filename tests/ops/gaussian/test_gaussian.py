"""gaussian against float64 arithmetic, torch's layer_norm and mse_loss, and SiameseIM's loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from m3i_fast.ops import gaussian, reference
from tests.shared.ops.cpu_capability import run_held_to
from tests.shared.ops.gaussian_cases import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    WIDTHS,
    Case,
    assert_right,
    by_torch,
    make,
    results,
)

every_kernel = pytest.mark.usefixtures("kernel")


@every_kernel
@pytest.mark.parametrize("weight", [0.0, 0.02, 3.0])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_as_accurate_as_torch(width: int, normalise: bool, weight: float) -> None:
    assert_right(
        gaussian, Case(width=width, normalise=normalise, decorrelation_weight=weight, sigma=0.4)
    )


@every_kernel
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_accurate_as_torch_in_other_types(
    dtypes: tuple[torch.dtype, torch.dtype], weight: float
) -> None:
    for width in (1, 30, 192, 1000, 1025, 1040):
        assert_right(gaussian, Case(width=width, dtypes=dtypes, decorrelation_weight=weight))


@every_kernel
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2), (67,), (1, 2200)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    """Also more than CPU's blocks have, and than a part that is widened for C."""
    for dtype in (FP32, BF16):
        case = Case(shape=shape, width=16, dtypes=(dtype, dtype), decorrelation_weight=0.3)
        if not shape:  # no dimension to flatten in by_torch
            case = Case(shape=shape, width=16, dtypes=(dtype, dtype))
        assert_right(gaussian, case)


@every_kernel
def test_more_rows_than_blocks() -> None:
    """So that warps meet several, on CUDA: 1056 blocks of 8."""
    assert_right(gaussian, Case(shape=(8600,), width=4, normalise=True))


@every_kernel
@pytest.mark.parametrize("normalise", [False, True])
def test_equals_torch_in_float64(normalise: bool) -> None:
    case = Case(shape=(3, 7), normalise=normalise, dtypes=(FP64, FP64), decorrelation_weight=0.2)
    for op in (gaussian, reference.gaussian):
        for ours, torchs in zip(
            results(op, *make(case), **case.options),
            results(by_torch, *make(case), **case.options),
            strict=True,
        ):
            torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


@every_kernel
def test_is_a_log_density() -> None:
    z_hat, z = make(Case(shape=(4, 7), width=9, dtypes=(FP64, FP64)))
    density = torch.distributions.Normal(z_hat, 0.7)
    constant = -torch.distributions.Normal(0.0, 0.7).log_prob(torch.tensor(0.0)).double()
    expected = -density.log_prob(z).mean() - constant
    torch.testing.assert_close(gaussian(z_hat, z, sigma=0.7), expected, atol=1e-7, rtol=1e-6)


@every_kernel
def test_decorrelation_equals_a_sum_over_pairs() -> None:
    """mean over r and s of (p_r . t_s)^2 / D."""
    p, t = make(Case(shape=(6, 3), width=8, dtypes=(FP64, FP64)))
    value = gaussian(p, t, decorrelation_weight=0.3) - gaussian(p, t)
    pairs = [(a @ b).square() for a in p.flatten(0, 1) for b in t.flatten(0, 1)]
    torch.testing.assert_close(value, 0.3 * torch.stack(pairs).mean() / 8)


@every_kernel
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("normalise", [False, True])
def test_centred_decorrelation_is_by_torchs_covariance(normalise: bool, dtype: torch.dtype) -> None:
    """p_r^T cov(t) p_r / D, and its gradient; of targets that are far from zero."""
    case = Case(shape=(6, 5), width=24, normalise=normalise, dtypes=(dtype, dtype))
    p, z = make(case)
    z = z + torch.linspace(-3, 3, 24, dtype=dtype)
    exact_p = p.detach().double().flatten(0, 1).requires_grad_()
    t = z.double().flatten(0, 1)
    t = torch.nn.functional.layer_norm(t, (24,)) if normalise else t
    truth = 0.7 * ((exact_p @ torch.cov(t.T, correction=0)) * exact_p).sum(-1).mean() / 24
    (truth_grad,) = torch.autograd.grad(3 * truth, exact_p)
    options = {"normalise": normalise, "decorrelation_weight": 0.7}
    found = [results(gaussian, p, z, **options, centred=c) for c in (False, True)]
    without = results(gaussian, p, z, normalise=normalise)
    tolerance = {FP64: 1e-12, FP32: 1e-5, BF16: 2e-2}[dtype]
    for kind, (ours, plain) in enumerate(zip(found[1], without, strict=True)):
        expected = (truth, truth_grad.view_as(p))[kind]
        error = (ours.double() - plain.double() - expected).abs().max()
        assert error <= tolerance * (plain.double().abs().max() + expected.abs().max())
    assert found[0][0] > found[1][0]  # a constant costs nothing any more


# ---- Rows that are hard --------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("width", [30, 192, 1025])
def test_rows_of_one_value_normalise_to_zero(width: int) -> None:
    """Exactly: the rounding of their mean would be 300 times as large, by 1 / sqrt(eps)."""
    z_hat, _ = make(Case(width=width))
    z = torch.tensor([0.0, 0.1, -1e4 / 3, 1e-3, 7e5 / 3]).repeat(2)[:, None].repeat(1, width)
    value, grad = results(gaussian, z_hat, z.view_as(z_hat), normalise=True)
    at_zero = results(gaussian, z_hat, torch.zeros_like(z_hat))
    assert torch.equal(value, at_zero[0]) and torch.equal(grad, at_zero[1])


@every_kernel
@pytest.mark.parametrize("mean", [1e3, 1e4, -1e5])
def test_rows_far_from_zero_lose_nothing(mean: float) -> None:
    """A hundredth of what mean(x^2) - mean(x)^2 loses, and no more than torch."""
    case = Case(width=768, mean=mean)
    assert_right(gaussian, case)
    z_hat, z = make(case)
    truth = results(reference.gaussian, z_hat.double(), z.double(), **case.options)
    grad = results(gaussian, z_hat, z, **case.options)[1]
    exact = z.double() - z.double().mean(-1, keepdim=True)
    naive = z.square().mean(-1, keepdim=True) - z.mean(-1, keepdim=True).square()
    by_naive = (exact / naive.double().clamp_min(1e-5).sqrt() - exact / exact.std()).abs().max()
    unit = truth[1].abs().max()
    # mean's own rounding to float32, relative to a deviation of 3
    assert (grad - truth[1]).abs().max() / unit < 1e-6 + 1e-7 * abs(mean) / 3
    assert by_naive > 1e-6 * abs(mean) / 3


@every_kernel
@pytest.mark.parametrize("width", [30, 192, 1025])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float, width: int) -> None:
    z_hat, z = make(Case(width=width))
    of_z = z.clone()
    of_z[1, 2, width // 2] = bad
    value, grad = results(gaussian, z_hat, of_z, normalise=True)
    assert value.isnan()
    finite = torch.ones_like(grad, dtype=torch.bool)
    finite[1, 2] = False  # the row that the bad one spoils
    assert torch.equal(grad.isfinite(), finite)
    of_z_hat = z_hat.clone()
    of_z_hat[0, 3, width - 1] = bad
    value, grad = results(gaussian, of_z_hat, z, normalise=True)
    assert torch.equal(value, torch.tensor(abs(bad)).float()) or value.isnan() and bad != bad
    assert grad.isfinite().sum() == grad.numel() - 1
    spoilt = results(gaussian, of_z_hat, z, decorrelation_weight=0.1)
    assert not spoilt[0].isfinite() and not spoilt[1][0, 3].isfinite().any()


@every_kernel
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_no_rows_are_worth_zero(shape: tuple[int, ...], weight: float) -> None:
    for dtype in (BF16, FP64):
        case = Case(shape=shape, dtypes=(dtype, dtype), decorrelation_weight=weight)
        value, grad = results(gaussian, *make(case), **case.options)
        assert value.item() == 0 and grad.shape == (*shape, 30) and grad.dtype == dtype


# ---- The arrays' places --------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("width", [192, 2048])
def test_unaligned_inputs(width: int) -> None:
    """By one element, which no vector of 16 bytes allows."""
    case = Case(width=width, dtypes=(BF16, FP32), decorrelation_weight=0.1)
    inputs = make(case)
    shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view_as(t).copy_(t) for t in inputs]
    for ours, expected in zip(
        results(gaussian, *shifted, **case.options),
        results(gaussian, *inputs, **case.options),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6 if not ours.dim() else 1e-2, atol=1e-7)


@every_kernel
def test_neighbours_do_not_see_each_other() -> None:
    """The gradient of a row depends on no other, and every value is its own."""
    case = Case(shape=(9,), width=200)
    z_hat, z = make(case)
    grad = results(gaussian, z_hat, z, **case.options)[1]
    values = []
    for row in range(9):
        value, part = results(gaussian, z_hat[row], z[row], **case.options)
        torch.testing.assert_close(part / 9, grad[row], rtol=1e-6, atol=1e-9)
        values.append(value)
    whole = gaussian(z_hat, z, **case.options)
    torch.testing.assert_close(torch.stack(values).mean(), whole, rtol=1e-6, atol=0)


_OTHER_SETS = """
import itertools
from m3i_fast.ops import gaussian
from tests.shared.ops.gaussian_cases import Case, DTYPES, WIDTHS, assert_right
for width, dtypes, weight in itertools.product(WIDTHS, DTYPES, (0.0, 0.5)):
    if width < 1000:
        assert_right(gaussian, Case(width=width, dtypes=dtypes, decorrelation_weight=weight))
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_are_as_accurate(capability: str) -> None:
    run_held_to(capability, _OTHER_SETS)


@pytest.mark.matrix
def test_more_than_2_to_the_31_elements() -> None:
    """Zeros that the system maps only where they are written: the last row alone takes memory."""
    rows = 2**21 + 3

    def zeros() -> Tensor:
        return torch.from_numpy(np.zeros((rows, 1024), np.uint16)).view(BF16)

    z_hat, z = zeros(), zeros()
    assert z_hat.numel() > 2**31
    z_hat[-1], z[-1] = 1.0, 2.0
    assert gaussian(z_hat, z).item() * 2 * rows == pytest.approx(1.0)
    z[-1, ::2] = -2.0
    assert gaussian(z_hat, z, normalise=True).item() * 2 * rows == pytest.approx(2.0, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
def test_on_a_gpu(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for width in WIDTHS:
        for weight in (0.0, 0.5):
            case = Case(shape=(3, 70), width=width, dtypes=dtypes, decorrelation_weight=weight)
            assert_right(gaussian, case, "cuda")
    z_hat, z = make(Case(shape=(50_000,), width=768, dtypes=dtypes), "cuda")
    runs = [results(gaussian, z_hat, z, normalise=True) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    if FP16 in dtypes:  # 50 000 squares overflow a half
        assert gaussian(z_hat, z, normalise=True, decorrelation_weight=1.0).isfinite()
