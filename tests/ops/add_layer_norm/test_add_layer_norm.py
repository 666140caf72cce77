"""add_layer_norm against torch's sum and layer_norm, and float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from m3i_fast.ops import add_layer_norm, reference
from m3i_fast.ops.add_layer_norm import MAX_WIDTH
from tests.shared.ops.cpu_capability import run_held_to
from tests.shared.tolerance import assert_as_accurate

FORWARD = torch.ops.m3i.add_layer_norm.default
BACKWARD = torch.ops.m3i.add_layer_norm_bwd.default
FP32, FP64, FP16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

# Of the stream, and of the branch and the norm.
DTYPES = [(FP32, FP32), (FP32, BF16), (FP32, FP16), (BF16, BF16), (FP16, FP16), (FP64, FP64)]
WIDTHS = (1, 3, 8, 30, 192, 384, 1000, 1025, 2048, MAX_WIDTH)
every_kernel = pytest.mark.usefixtures("kernel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    shape: tuple[int, ...] = (2, 5)
    """Without the width."""
    width: int = 30
    dtypes: tuple[torch.dtype, torch.dtype] = (FP32, FP32)
    branch: bool = True


def make(case: Case, device: str = "cpu") -> list[Tensor | None]:
    """Return x, the branch, weight and bias, leaves."""
    rng = torch.Generator().manual_seed(case.width)
    stream, product = case.dtypes
    wide = FP64 if stream == FP64 else FP32
    shape = *case.shape, case.width
    x, branch = torch.randn(shape, generator=rng) * 3 + 1, torch.randn(shape, generator=rng)
    weight, bias = (torch.randn(case.width, generator=rng) for _ in range(2))
    inputs = (x, stream), (branch if case.branch else None, product), (weight, wide), (bias, wide)
    return [None if t is None else t.to(device, d).requires_grad_() for t, d in inputs]


def by_torch(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What autocast makes of the sum and the norm: float32 of the rounded sum, rounded once."""
    total = x if branch is None else x + branch
    return total, F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias).to(dtype)


def results(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: list[Any], *rest: Any
) -> list[Tensor]:
    """Return the sum, the norm, and the gradients of all inputs by fixed gradients of both."""
    total, normed = op(*inputs, *rest)
    rng = torch.Generator().manual_seed(7)
    grads = [torch.randn(total.shape, generator=rng).to(t.device, t.dtype) for t in (total, normed)]
    leaves = [leaf for leaf in inputs if leaf is not None]
    found = torch.autograd.grad((total, normed), leaves, grads)
    return [total.detach(), normed.detach(), *found]


def ours(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Any:
    return add_layer_norm(x, branch, weight, bias, dtype=dtype)


def assert_right(case: Case, device: str = "cpu") -> None:
    """Values and gradients are no less accurate than torch's in the same types.

    The truth begins with the sum as it is rounded in the stream's type. That of float64 is rounded
    itself, which a width of 1 multiplies by 1 / sqrt(eps): then there is none.
    """
    if case.width == 1 and case.dtypes[0] == FP64:
        return
    inputs, product = make(case, device), case.dtypes[1]
    got, torchs = results(ours, inputs, product), results(by_torch, inputs, product)
    wide = [None if t is None else t.detach().double().cpu().requires_grad_() for t in inputs]

    def exact(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> Any:
        total = x if branch is None else x + branch
        rounded = total + (total.to(case.dtypes[0]).double() - total).detach()
        return total, F.layer_norm(rounded, weight.shape, weight, bias)

    rng = torch.Generator().manual_seed(7)
    total, normed = exact(*wide)
    grads = [
        torch.randn(total.shape, generator=rng).to(dtype).double()
        for dtype in (case.dtypes[0], product)
    ]
    leaves = [leaf for leaf in wide if leaf is not None]
    truth = [total, normed, *torch.autograd.grad((total, normed), leaves, grads)]
    names = ["sum", "norm", "of x", *["of branch"] * case.branch, "of weight", "of bias"]
    for name, a, b, c in zip(names, got, torchs, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        ulps = {FP64: 64.0, FP32: 8.0}.get(a.dtype, 0.6)
        try:
            assert_as_accurate(a.cpu(), b.cpu(), c.detach(), times=2.0, ulps=ulps)
        except AssertionError as fault:
            raise AssertionError(f"{name} of {case}: {fault}") from fault


# ---- Values --------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_as_accurate_as_torch(width: int, branch: bool) -> None:
    assert_right(Case(width=width, branch=branch))


@every_kernel
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_as_accurate_as_torch_in_other_types(dtypes: Any, branch: bool) -> None:
    for width in (1, 30, 192, 1025, 1536):
        assert_right(Case(width=width, dtypes=dtypes, branch=branch))


@every_kernel
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 2), (0, 4), (67,)])
def test_any_number_of_rows(shape: tuple[int, ...]) -> None:
    for dtypes in ((FP32, BF16), (FP64, FP64)):
        assert_right(Case(shape=shape, width=16, dtypes=dtypes))


@every_kernel
def test_more_rows_than_blocks() -> None:
    """So that blocks meet several, on CUDA 528 of two and of one, and CPU's sums have parts."""
    for dtype in (FP32, FP64):
        assert_right(Case(shape=(1121,), width=8, dtypes=(dtype, dtype)))
    assert_right(Case(shape=(300,), width=512))


@every_kernel
def test_equals_torch_in_float64() -> None:
    for branch in (False, True):
        inputs = make(Case(shape=(3, 7), width=33, dtypes=(FP64, FP64), branch=branch))
        expected = results(by_torch, inputs, FP64)
        for op in (ours, lambda *a: reference.add_layer_norm(*a[:4])):
            for a, b in zip(results(op, inputs, FP64), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@every_kernel
def test_a_large_mean_costs_no_more_digits_than_torchs() -> None:
    x = torch.randn(4, 384, generator=torch.Generator().manual_seed(0)) + 1000
    weight, bias = torch.ones(384), torch.zeros(384)
    truth = F.layer_norm(x.double(), (384,))
    torchs = F.layer_norm(x, (384,))
    assert_as_accurate(add_layer_norm(x, None, weight, bias)[1], torchs, truth, times=2.0, ulps=8.0)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets_are_as_accurate(capability: str) -> None:
    run_held_to(
        capability,
        "from tests.ops.add_layer_norm.test_add_layer_norm import *\n"
        "for width in WIDTHS:\n"
        "    for dtypes in DTYPES:\n"
        "        assert_right(Case(width=width, dtypes=dtypes))\n",
    )


# ---- torch's own checks --------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("branch", [False, True])
def test_gradcheck(branch: bool) -> None:
    inputs = make(Case(shape=(3, 2), width=6, dtypes=(FP64, FP64), branch=branch))
    assert gradcheck(add_layer_norm, inputs)


@every_kernel
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype], branch: bool) -> None:
    x, added, weight, bias = make(Case(shape=(2, 3), width=8, dtypes=dtypes, branch=branch))
    torch.library.opcheck(FORWARD, (x, added, weight, bias, 1e-5, dtypes[1]))
    with torch.no_grad():
        total, normed, mean, rstd = FORWARD(x, added, weight, bias, 1e-5, dtypes[1])
    total = total if branch else x.detach()
    for grad_sum in (None, total):
        for needs in ((False, False), (True, True)):
            torch.library.opcheck(
                BACKWARD, (normed, grad_sum, total, weight.detach(), mean, rstd, *needs)
            )


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, BF16), (BF16, BF16)])
def test_compiles_to_one_graph_with_the_same_bits(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = make(Case(dtypes=dtypes))
    expected = results(ours, inputs, dtypes[1])
    for a, b in zip(results(compiled, inputs, dtypes[1]), expected, strict=True):
        assert torch.equal(a, b)


def test_an_exported_program_is_torchs_expression() -> None:
    class Norm(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return ours(*inputs, BF16)

    inputs = tuple(t.detach() for t in make(Case(dtypes=(FP32, BF16))))
    program = torch.export.export(Norm(), inputs)
    assert not [n for n in program.graph.nodes if "m3i" in str(n.target)]
    for a, b in zip(program.module()(*inputs), by_torch(*inputs, BF16), strict=True):
        assert torch.equal(a, b)


def test_threads_and_repetition_change_no_bit() -> None:
    inputs = make(Case(shape=(7, 61), width=700))
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(results(ours, inputs, FP32))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# ---- Gradients -----------------------------------------------------------------------------------


@every_kernel
def test_gradients_of_one_result_alone() -> None:
    for dtypes in ((FP32, FP32), (FP32, BF16)):
        inputs = make(Case(dtypes=dtypes))
        for which in (0, 1):
            grads = []
            for op in (ours, by_torch):
                result = op(*inputs, dtypes[1])[which]
                leaves = inputs[: 2 if which == 0 else 4]
                grads.append(torch.autograd.grad(result, leaves, torch.full_like(result, 0.5)))
            for a, b in zip(*grads, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == BF16 else 1e-4, atol=1e-5)


@every_kernel
def test_frozen_norms_have_no_gradient() -> None:
    x, branch, weight, bias = make(Case())
    weight.requires_grad_(False), bias.requires_grad_(False)
    total, normed = add_layer_norm(x, branch, weight, bias)
    (total.sum() + normed.square().sum()).backward()
    assert weight.grad is None and bias.grad is None and torch.equal(x.grad, branch.grad)


def test_a_second_derivative_is_refused() -> None:
    x, branch, weight, bias = make(Case())
    _, normed = add_layer_norm(x, branch, weight, bias)
    (grad,) = torch.autograd.grad(normed.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="add_layer_norm: expected to be differentiated once"):
        grad.sum().backward()


def test_what_is_kept_for_the_backward() -> None:
    """The sum, which the stream goes on with, two numbers a row, and the weight."""
    x, branch, weight, bias = make(Case(shape=(40,), width=96, dtypes=(FP32, BF16)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total, _ = add_layer_norm(x, branch, weight, bias, dtype=BF16)
    assert sorted(tuple(t.shape) for t in kept) == [(40,), (40,), (40, 96), (96,)]
    assert total.data_ptr() in {t.data_ptr() for t in kept}


# ---- Refusals ------------------------------------------------------------------------------------

_X = torch.zeros(2, 3, 8)
_RIGHT: dict[str, Any] = {
    "x": _X,
    "branch": _X,
    "weight": torch.ones(8),
    "bias": torch.zeros(8),
}
# name: (arguments that differ from the right ones, what the message must say)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"branch": _X[:, :2]}, r"branch: expected .*\[2, 3, 8\].*got .*\[2, 2, 8\]"),
    "branch's type": ({"branch": _X.double()}, r"branch: expected .*float32.*got .*float64"),
    "no dimension": ({"x": torch.zeros(()), "branch": None}, r"x: expected shape \[\.\.\., D\]"),
    "too wide": (
        {"x": torch.zeros(1, MAX_WIDTH + 1), "branch": None},
        r"x: expected shape \[\.\.\., D\] with 0 < D <= 4096, got \[1, 4097\]",
    ),
    "whole numbers": ({"x": _X.int()}, r"x: expected float32, .* got \S*int32"),
    "wider norm": ({"dtype": FP64}, r"dtype: expected that of x, .* got \S*float64 beside"),
    "weight": ({"weight": torch.ones(7)}, r"weight: expected shape \[8\], got \[7\]"),
    "bias": ({"bias": torch.ones(1, 8)}, r"bias: expected shape \[8\], got \[1, 8\]"),
    "no eps": ({"eps": 0.0}, r"eps: expected a finite value > 0, got 0"),
}


@every_kernel
@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    add_layer_norm(**_RIGHT)
    with pytest.raises(RuntimeError, match=message):
        add_layer_norm(**{**_RIGHT, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES)
def test_on_a_gpu(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for width in WIDTHS:
        for branch in (False, True):
            assert_right(Case(shape=(3, 70), width=width, dtypes=dtypes, branch=branch), "cuda")
    inputs = make(Case(shape=(20_000,), width=768, dtypes=dtypes), "cuda")
    runs = [results(ours, inputs, dtypes[1]) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
