"""boltzmann against float64 arithmetic, open_clip's losses and torch's cross-entropy."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from m3i_fast.ops import boltzmann, reference
from tests.ops.boltzmann.cases import (
    FP32,
    FP64,
    HALVES,
    HARD,
    KINDS,
    Case,
    assert_right,
    grid,
    leaves,
    make,
)


def test_the_grid_has_200_cases() -> None:
    cases = list(grid())
    assert len(cases) >= 200 and {case.kind for case in cases} == set(KINDS)


@pytest.mark.parametrize("dtype", [FP32, FP64, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_torch(kind: str, dtype: torch.dtype) -> None:
    for case in grid():
        if case.kind == kind:
            assert_right(case, dtype)


@pytest.mark.parametrize("dtype", [FP32, FP64, *HALVES])
@pytest.mark.parametrize("case", HARD.values(), ids=HARD)
def test_hard_cases(case: Case, dtype: torch.dtype) -> None:
    assert_right(case, dtype)


def small(kind: str) -> list[Case]:
    return [case for case in grid() if case.kind == kind and case.rows * case.width < 1500]


@pytest.mark.parametrize("kind", KINDS)
def test_both_kernels(kind: str, kernel: str) -> None:
    for case, dtype in zip(small(kind), itertools.cycle([FP32, *HALVES, FP64])):  # noqa: B905
        assert_right(case, dtype)


# ---- Others' losses ------------------------------------------------------------------------------


def assert_same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 33, 64, 257])
@pytest.mark.parametrize("scale", [1.0, 14.285, 100.0])
def test_equals_open_clip(n: int, scale: float) -> None:
    inputs = leaves(Case("diagonal", n, n, 24, scale=scale))
    assert_same(boltzmann(*inputs), ClipLoss()(*inputs), inputs)
    inputs = leaves(Case("sigmoid", n, n, 24, scale=scale))
    *features, bias = inputs
    ours = boltzmann(*features, bias=bias, form="sigmoid")
    assert_same(ours, SigLipLoss()(*features, bias), inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_cross_entropy(reduction: str) -> None:
    z_hat, z, scale, bias = inputs = leaves(Case("classes with bias", 40, 300, 24))
    targets = torch.arange(40) % 11 - 1
    ours = boltzmann(z_hat, z, scale, targets=targets, bias=bias, reduction=reduction)
    logits = scale * z_hat @ z.T + bias
    theirs = F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
    assert_same(ours, theirs, inputs)


def by_loop(z_hat: Tensor, z: Tensor, scale: float, rows: list[int], cols: list[int]) -> float:
    """Each row's mean over its positives of -log softmax over the annotated columns, both ways."""

    def one_way(logits: Tensor, own: list[int], other: list[int]) -> float:
        candidates = [j for j, c in enumerate(other) if c != -1]
        losses = []
        for i, r in enumerate(own):
            positives = [j for j in candidates if other[j] == r]
            if r == -1 or not positives:
                continue
            denominator = sum(float(logits[i, j].exp()) for j in candidates)
            terms = [-float(torch.log(logits[i, j].exp() / denominator)) for j in positives]
            losses.append(sum(terms) / len(terms))
        return sum(losses) / max(len(losses), 1)

    logits = scale * z_hat @ z.T
    return 0.5 * (one_way(logits, rows, cols) + one_way(logits.T, cols, rows))


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 1, 3], [1, 0, 1, 3]),  # two variants of a concept
        ([0, -1, 2, 5], [0, 2, -1, 2, 7]),  # no caption, no positive, another size
        ([-1, -1], [-1, -1]),  # nothing is annotated
        ([7, 7, 7], [7, 7]),  # all are positives
        ([-7, 2**62], [2**62, -7]),
    ],
)
def test_ids_equal_a_loop(rows: list[int], cols: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    z_hat, z = (
        F.normalize(torch.randn(len(ids), 16, generator=rng, dtype=FP64), dim=1).requires_grad_()
        for ids in (rows, cols)
    )
    value = boltzmann(
        z_hat, z, torch.tensor(7.0), row_ids=torch.tensor(rows), col_ids=torch.tensor(cols)
    )
    expected = by_loop(z_hat.detach(), z.detach(), 7.0, rows, cols)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    for grad, ids in zip(torch.autograd.grad(value, (z_hat, z)), (rows, cols), strict=True):
        assert bool(grad.isfinite().all())
        assert float(grad[torch.tensor(ids) == -1].abs().sum()) == 0.0


@pytest.mark.parametrize("scale", [25.0, 60.0, 100.0])
def test_converged_pairs_keep_their_precision(scale: float, kernel: str) -> None:
    """Of a loss of 1e-7 and less, all places are right; differences would lose them."""
    n = 64
    call = make(Case("diagonal", n, n, 64, scale=scale, align=0.93), FP32)
    z_hat, z, _ = call.tensors.values()
    logits = scale * z_hat @ z.T
    grad_logits, expected = torch.zeros(n, n, dtype=FP64), 0.0
    for x, grad in ((logits, grad_logits), (logits.T, grad_logits.T)):
        likely = (x - x.diagonal()[:, None]).exp().fill_diagonal_(0)  # by the positive
        odds = likely.sum(1, keepdim=True)
        expected += float(odds.log1p().mean()) / 2
        grad += (likely - odds.diagflat()) / (1 + odds) / (2 * n)
    ours = call.run(boltzmann, FP32)
    assert expected < 1e-6
    assert float(ours["value"]) == pytest.approx(expected, rel=2e-5)
    truth = {"z_hat": scale * grad_logits @ z, "z": scale * grad_logits.T @ z_hat}
    truth["scale"] = (grad_logits * logits).sum() / scale
    for name, gradient in truth.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < 1e-4, f"{name}: {error}"


# ---- Derivatives and properties ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, kernel: str) -> None:
    shape = (5, 6) if "ids" in kind or "classes" in kind else (5, 5)
    call = make(Case(kind, *shape, 4, scale=3.0))
    names = [*call.tensors][3:]

    def function(z_hat: Tensor, z: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        return boltzmann(z_hat, z, scale, **dict(zip(names, rest, strict=True)), **call.options)

    inputs = tuple(tensor.requires_grad_() for tensor in call.tensors.values())
    assert torch.autograd.gradcheck(function, inputs)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**20), st.sampled_from(KINDS))
def test_permuting_the_batch_permutes_the_gradients(
    rows: int, width: int, seed: int, kind: str
) -> None:
    square = kind in ("diagonal", "rows alone", "sigmoid")
    call = make(Case(kind, rows, rows if square else 13, width))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    permuted = make(Case(kind, rows, rows if square else 13, width))
    permuted.tensors["z_hat"] = call.tensors["z_hat"][order]
    if square:
        permuted.tensors["z"] = call.tensors["z"][order]
    for name in {"targets", "row_ids"} & call.options.keys():
        permuted.options[name] = call.options[name][order]
    one, other = call.run(boltzmann, FP64), permuted.run(boltzmann, FP64)
    torch.testing.assert_close(one["value"], other["value"], rtol=1e-12, atol=1e-13)
    for name in ("z_hat", "z"):
        grad = one[name][order] if name == "z_hat" or square else one[name]
        torch.testing.assert_close(grad, other[name], rtol=1e-9, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(st.floats(-300, 300), st.sampled_from([kind for kind in KINDS if "sigmoid" not in kind]))
def test_a_constant_added_to_all_logits_changes_nothing(constant: float, kind: str) -> None:
    square = kind in ("diagonal", "rows alone")
    case = Case(kind, 23, 23 if square else 17, 6)
    with_bias, without = make(case), make(case)
    with_bias.tensors["bias"] = with_bias.tensors.get("bias", torch.zeros((), dtype=FP64))
    with_bias.tensors["bias"] = with_bias.tensors["bias"] + constant
    one, other = with_bias.run(boltzmann, FP64), without.run(boltzmann, FP64)
    for name in ("value", "z_hat", "z", "scale"):
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-11)
    assert abs(float(one["bias"].sum())) < 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(2, 5))
def test_duplicate_positives_share(pairs: int, copies: int) -> None:
    """Equal columns of one id have equal gradients; both of a row count half."""
    call = make(Case("diagonal", pairs, pairs, 8))
    ids = torch.arange(pairs)
    call.tensors["z"] = call.tensors["z"].repeat_interleave(copies, 0)
    call.options.update(row_ids=ids, col_ids=ids.repeat_interleave(copies))
    grad = call.run(boltzmann, FP64)["z"].unflatten(0, (pairs, copies))
    torch.testing.assert_close(grad, grad[:, :1].expand_as(grad))
    truth = call.run(reference.boltzmann, FP64)["z"].unflatten(0, (pairs, copies))
    torch.testing.assert_close(grad, truth)


# ---- What torch asks of an op --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diagonal", "ids", "classes with bias", "sigmoid"])
def test_compiles_whole(kind: str) -> None:
    square = kind in ("diagonal", "sigmoid")
    call = make(Case(kind, 33, 33 if square else 20, 8))
    compiled = torch.compile(boltzmann, fullgraph=True, backend="aot_eager")
    one, other = call.run(boltzmann, FP32), call.run(compiled, FP32)
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name)


@pytest.mark.parametrize("kind", ["diagonal", "ids"])
def test_one_compiled_graph_serves_all_sizes(kind: str) -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(boltzmann, fullgraph=True, dynamic=True, backend=backend)
    for n in (33, 70, 129):
        call = make(Case(kind, n, n, 8))
        assert torch.equal(call.run(compiled, FP32)["z"], call.run(boltzmann, FP32)["z"])
    assert len(graphs) == 1


def test_opcheck(kernel: str) -> None:
    for kind, sigmoid in (("ids", False), ("sigmoid", True)):
        tensors = make(Case(kind, 9, 9, 5), FP32).tensors
        block: list[Any] = [tensors[name].float() for name in ("z_hat", "z", "scale")]
        block += [torch.zeros(9), torch.arange(9, dtype=torch.int32)]
        ids, shift = torch.arange(9, dtype=torch.int32).flip(0), torch.zeros(9)
        flag = torch.tensor(True)
        ops = torch.ops.m3i
        weights = torch.rand(3, 9), torch.rand(3, 9)
        calls: list[tuple[Any, list[Any]]] = [
            (ops.boltzmann_maxima.default, [*block, flag]),
            (ops.boltzmann_sums.default, [*block, ids, shift, shift, True, True, sigmoid, flag]),
            (ops.boltzmann_grads.default, [*block, ids, shift, shift, flag, *weights, sigmoid,
                                           [True, True, True]]),
        ]  # fmt: skip
        for op, arguments in calls:
            torch.library.opcheck(op, tuple(arguments))


def test_autocast_casts_the_features() -> None:
    call = make(Case("diagonal", 33, 33, 16))
    with torch.autocast("cpu", torch.bfloat16):
        got = call.run(boltzmann, FP32)
    rounded = make(Case("diagonal", 33, 33, 16), torch.bfloat16)
    expected = rounded.run(boltzmann, torch.bfloat16)
    assert float(got["value"]) == float(expected["value"])


@pytest.mark.parametrize("frozen", ["z_hat", "z", "scale"])
def test_what_needs_no_gradient_gets_none(frozen: str, kernel: str) -> None:
    tensors = {name: t.float() for name, t in make(Case("diagonal", 17, 17, 8)).tensors.items()}
    wanted = [tensors[name].requires_grad_() for name in tensors if name != frozen]
    boltzmann(*tensors.values()).backward()
    assert tensors[frozen].grad is None and all(tensor.grad is not None for tensor in wanted)


def test_the_same_bits_every_time() -> None:
    call = make(Case("ids", 700, 2500, 24), FP32)
    one, other = call.run(boltzmann, FP32), call.run(boltzmann, FP32)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_once_differentiable() -> None:
    for case, form in (
        (Case("diagonal", 5, 5, 4), "softmax"),
        (Case("sigmoid", 5, 5, 4), "sigmoid"),
    ):
        z_hat, z, scale = leaves(case)[:3]
        value = boltzmann(z_hat, z, scale, form=form)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(value, z_hat, create_graph=True)
