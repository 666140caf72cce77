"""The row-only softmax of boltzmann: its gradient in the forward, soft targets and Sinkhorn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightly.models.modules.center import Center
from torch import Tensor

from m3i_fast.ops import SoftTargets, boltzmann, boltzmann_rows
from tests.ops.boltzmann.cases import FP32, FP64, HALVES, Case, make
from tests.ops.boltzmann.soft_cases import Soft, assert_soft_right, by_torch, probabilities, soft
from tests.shared.allocated import most_allocated

DTYPES = (FP32, FP64, *HALVES)


# ---- Soft targets --------------------------------------------------------------------------------


SHAPES = ((1, 1), (1, 40), (2, 5), (33, 17), (70, 130), (129, 64))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soft_targets_equal_torchs_expression(reduction: str, kernel: str) -> None:
    """Value and gradients to 1e-10 in float64."""
    kinds = itertools.cycle(itertools.product((False, True), repeat=2))
    for (rows, columns), (weighted, bias) in zip(SHAPES, kinds):  # noqa: B905
        call = soft(rows, columns, weighted=weighted, bias=bias)
        ours = call.run(boltzmann, FP64, reduction=reduction)
        truth = call.run(by_torch, FP64, reduction=reduction)
        for name in truth:
            torch.testing.assert_close(ours[name], truth[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [FP32, *HALVES])
def test_soft_targets_are_as_accurate_as_torch(dtype: torch.dtype, kernel: str) -> None:
    scales = itertools.cycle((10.0, 100.0, 1.0, 10.0, 100.0))
    for shape, scale in zip(SHAPES, scales):  # noqa: B905
        assert_soft_right(shape, scale, dtype)


@pytest.mark.parametrize("gap", [10.0, 20.0, 30.0])
def test_small_losses_keep_their_precision(gap: float, kernel: str) -> None:
    """Student and teacher are nearly certain of the same column; torch's loss in float32 is 0."""
    n = 12
    eye = torch.eye(n, dtype=FP64)
    noise = 0.2 * torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=FP64)
    rows = (eye + noise).float().double()
    scale = torch.tensor(gap, dtype=FP64)
    call = Soft({"z_hat": rows, "z": eye, "scale": scale}, SoftTargets(rows, eye, 1.5 * scale))
    ours = call.run(boltzmann, FP32)
    p, t = (gap * rows).softmax(1), probabilities(call.targets)
    # Even in float64 the difference of two numbers near 1 loses places: a row of G sums to 0.
    others = (p - t).fill_diagonal_(0)
    grad_logits = (others - others.sum(1).diag()) / n
    truth = {"z_hat": gap * grad_logits, "z": gap * grad_logits.T @ rows}
    assert float(ours["value"]) == pytest.approx(float(call.run(by_torch, FP64)["value"]), rel=2e-5)
    for name, gradient in truth.items():
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < 5e-5, f"{name}: {error}"


def test_a_hard_teacher_equals_classes(kernel: str) -> None:
    """A teacher that is certain: the loss and gradients of the classes it chooses."""
    call = make(Case("classes", 21, 40, 16))
    targets = call.options["targets"].clamp_min(0)
    leaves = [x.requires_grad_() for x in call.tensors.values()]
    one_hot = F.one_hot(targets, 40).double()
    teacher = SoftTargets(one_hot, torch.eye(40, dtype=FP64), torch.tensor(1e4, dtype=FP64))
    by_classes, by_teacher = (boltzmann(*leaves, targets=kind) for kind in (targets, teacher))
    torch.testing.assert_close(by_classes, by_teacher)
    for a, b in zip(*(torch.autograd.grad(v, leaves) for v in (by_classes, by_teacher)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_gradcheck_of_soft_targets() -> None:
    call = soft(5, 6, 4, scale=3.0, target_scale=3.0, weighted=True, bias=True)

    def function(*tensors: Tensor) -> Tensor:
        return boltzmann(**dict(zip(call.tensors, tensors, strict=True)), targets=call.targets)

    assert torch.autograd.gradcheck(
        function, tuple(tensor.requires_grad_() for tensor in call.tensors.values())
    )


def test_targets_are_constants() -> None:
    call = soft(5, 6, weighted=True)
    fields = {name: getattr(call.targets, name) for name in SoftTargets.__slots__}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in fields.items()}
    z_hat = call.tensors["z_hat"].requires_grad_()
    tensors = {**call.tensors, "z_hat": z_hat}
    boltzmann(**tensors, targets=SoftTargets(**leaves)).backward()
    assert z_hat.grad is not None
    assert all(leaf.grad is None for leaf in leaves.values())


def test_dinos_loss() -> None:
    """lightly's centre and the published expression, on all logits."""
    call = soft(40, 64, dtype=FP32)
    student, teacher = call.tensors, call.targets
    logits = (teacher.z_hat @ teacher.z.T).float()
    centre = Center((1, 64), momentum=0.9)
    centre.update(logits)
    published = (logits - centre.value) / 0.04
    truth = F.cross_entropy((student["z_hat"] @ student["z"].T).float() / 0.1, published.softmax(1))
    scale = torch.tensor(1 / 0.04)
    ours = boltzmann(
        student["z_hat"].float(),
        student["z"].float(),
        torch.tensor(1 / 0.1),
        targets=SoftTargets(teacher.z_hat.float(), teacher.z.float(), scale,
                            -scale * centre.value.flatten()),
    )  # fmt: skip
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_soft_targets_compile_whole(dtype: torch.dtype, dynamic: bool) -> None:
    call = soft(9, 20, weighted=dtype == FP32, bias=True, dtype=dtype)
    torch._dynamo.reset()

    def function(**given: Any) -> Tensor:
        return boltzmann(**given)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    one, other = call.run(boltzmann, dtype), call.run(compiled, dtype)
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name)


# ---- Sinkhorn ------------------------------------------------------------------------------------


def sinkhorn_log_scale(*features: Tensor, **options: Any) -> Tensor:  # [M]
    log_scale = SoftTargets.sinkhorn(*features, **options).column_log_scale
    assert log_scale is not None
    return log_scale


def published_sinkhorn(logits: Tensor, num_iterations: int) -> Tensor:  # [N, K]
    """DINOv2's loop as published: exponentials, prototypes by their sums, samples by theirs."""
    q = logits.exp().T
    num_prototypes, num_samples = q.shape
    q = q / q.sum()
    for _ in range(num_iterations):
        q = q / q.sum(1, keepdim=True) / num_prototypes
        q = q / q.sum(0, keepdim=True) / num_samples
    return (q * num_samples).T


@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_sinkhorn_equals_the_published_loop(
    num_iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, columns, block in ((1, 7, 64 << 20), (50, 33, 64 << 20), (50, 33, 8 * 48 * 7)):
        monkeypatch.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", block)
        of = soft(rows, columns).targets
        log_scale = sinkhorn_log_scale(of.z_hat, of.z, of.scale, num_iterations=num_iterations)
        ours = probabilities(replace(of, column_log_scale=log_scale))
        truth = published_sinkhorn(of.scale * of.z_hat @ of.z.T, num_iterations)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [FP64, *HALVES])
def test_sinkhorn_of_whole_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """MSN's: rows are softmaxes before columns are balanced; and what `blocks` yields."""
    monkeypatch.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", 8 * 48 * 7)
    of = soft(50, 33, dtype=dtype).targets
    ours = SoftTargets.sinkhorn(of.z_hat.to(dtype), of.z.to(dtype), of.scale, whole_rows=True)
    rows = (of.scale * of.z_hat @ of.z.T).log_softmax(1)
    found = torch.cat([block.clone() for _, block in ours.blocks()]).double()
    places = 1e-10 if dtype == FP64 else 2e-5
    torch.testing.assert_close(found, published_sinkhorn(rows, 3), rtol=places, atol=places)


def test_sinkhorn_of_logits_that_exp_cannot_hold() -> None:
    """DINOv2's issue 583: the exponentials overflow float32, and prototypes vanish."""
    of = soft(50, 33).targets
    scale = torch.tensor(400.0, dtype=FP64)
    truth = published_sinkhorn(scale * of.z_hat @ of.z.T, 3)
    log_scale = sinkhorn_log_scale(of.z_hat.float(), of.z.float(), scale.float())
    ours = probabilities(replace(of, scale=scale, column_log_scale=log_scale.double()))
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [FP32, *HALVES])
def test_sinkhorn_in_other_types(dtype: torch.dtype) -> None:
    of = soft(50, 33, dtype=dtype).targets
    ours = sinkhorn_log_scale(of.z_hat.to(dtype), of.z.to(dtype), of.scale.float())
    assert ours.dtype == FP32
    torch.testing.assert_close(
        ours.double(), sinkhorn_log_scale(of.z_hat, of.z, of.scale), rtol=1e-5, atol=2e-5
    )


# ---- Blocks and memory ---------------------------------------------------------------------------


@pytest.fixture(params=[1, 3, 64])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of so many rows of at most 144 columns in float32, half as many in float64."""
    monkeypatch.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", request.param * 144 * 4)
    monkeypatch.setattr(boltzmann_rows, "_COPY_BYTES", 17 * 24 * 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_add_up(dtype: torch.dtype) -> None:
    classes = make(Case("classes with bias", 130, 144, 24), dtype)
    teacher = soft(130, 144, weighted=True, bias=True, dtype=dtype)
    blocks = classes.run(boltzmann, dtype), teacher.run(boltzmann, dtype)
    with pytest.MonkeyPatch.context() as whole:
        whole.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", 1 << 30)
        whole.setattr(boltzmann_rows, "_COPY_BYTES", 1 << 30)
        truth = classes.run(boltzmann, dtype), teacher.run(boltzmann, dtype)
    eps = torch.finfo(FP64 if dtype == FP64 else FP32).eps
    for ours, wholes in zip(blocks, truth, strict=True):
        for name in wholes:
            places = torch.finfo(dtype).eps if name in ("z_hat", "z") else 0
            torch.testing.assert_close(ours[name], wholes[name], rtol=2 * places + 64 * eps,
                                       atol=64 * eps)  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_memory_is_that_of_a_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of N x M beside inputs, gradients and blocks, which are as large as they may be."""
    rows, columns, width, block = 600, 4096, 16, 1 << 20
    monkeypatch.setitem(boltzmann_rows._BLOCK_BYTES, "cpu", block)
    monkeypatch.setattr(boltzmann_rows, "_COPY_BYTES", 1 << 16)
    call = soft(rows, columns, width, bias=True, dtype=dtype)
    given = {name: x.to(dtype if name in ("z_hat", "z") else FP32).requires_grad_()
             for name, x in call.tensors.items()}  # fmt: skip
    of = call.targets
    assert of.column_log_scale is not None
    targets = SoftTargets(of.z_hat.to(dtype), of.z.to(dtype), of.scale.float(),
                          of.column_log_scale.float())  # fmt: skip
    ids = torch.arange(rows) % columns
    wide_grads = (rows + columns) * width * 4
    vectors = 16 * (rows + columns) * 4 + 2 * (1 << 16)
    for kind in (ids, targets):

        def forward(kind: Tensor | SoftTargets = kind) -> Tensor:
            return boltzmann(**given, targets=kind)

        most = most_allocated(forward)
        assert block < most <= block + wide_grads + vectors
        value = forward()
        most = most_allocated(lambda value=value: torch.autograd.grad(value, list(given.values())))
        # Scaled in place, or in wide elements and rounded.
        assert most <= (vectors if dtype == FP32 else 2 * wide_grads + vectors)
        with torch.no_grad():
            assert most_allocated(forward) <= block + vectors
    sinkhorn = most_allocated(lambda: sinkhorn_log_scale(targets.z_hat, targets.z, targets.scale))
    assert sinkhorn <= block + vectors

    def walk() -> None:
        for _ in targets.blocks():
            pass

    assert block / 4 < most_allocated(walk) <= block / 2 + vectors


# ---- Which gradients, and how often --------------------------------------------------------------


NEEDS = [needs for needs in itertools.product((False, True), repeat=4) if any(needs)]


@pytest.mark.parametrize("needs", [(False,) * 4, *NEEDS])
def test_only_what_is_needed_is_computed(
    needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three products at most: the logits, and one for each side that needs a gradient."""
    products: list[tuple[int, int]] = []
    multiply = boltzmann_rows._multiply

    def counted(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        products.append((len(out), out.shape[1]))
        multiply(a, b, out, add=add)

    monkeypatch.setattr(boltzmann_rows, "_multiply", counted)
    call = make(Case("classes with bias", 20, 30, 8))
    truth = call.run(boltzmann, FP64)
    products.clear()
    inputs = {
        name: tensor.requires_grad_(need)
        for (name, tensor), need in zip(call.tensors.items(), needs, strict=True)
    }
    value = boltzmann(**inputs, **call.options)
    assert products == [(20, 30), *[(20, 8)] * needs[0], *[(30, 8)] * needs[1]]
    assert value.requires_grad == any(needs)
    torch.testing.assert_close(value.detach().double(), truth["value"])
    wanted = [name for name, need in zip(inputs, needs, strict=True) if need]
    if wanted:
        grads = torch.autograd.grad(value, [inputs[name] for name in wanted])
        for name, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, truth[name])


def test_a_graph_may_be_used_twice() -> None:
    """What is saved is not changed by a backward pass."""
    call = soft(20, 30, bias=True)
    leaves = [tensor.requires_grad_() for tensor in call.tensors.values()]
    value = boltzmann(**call.tensors, targets=call.targets)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(2 * value, leaves)
    for one, own, two in zip(first, kept, second, strict=True):
        torch.testing.assert_close(2 * one, two)
        assert torch.equal(one, own)
    with pytest.raises(RuntimeError, match="differentiated once"):
        value = boltzmann(**call.tensors, targets=call.targets)
        torch.autograd.grad(value, leaves, create_graph=True)


def test_fp16_gradients_are_scaled_before_they_are_rounded() -> None:
    """A mean over many rows is below fp16's numbers, until the factor of a loss scaler comes."""
    rows = 4096
    call = soft(rows, 8, 4, scale=0.01, dtype=torch.float16)
    z_hat, z = (call.tensors[name].half() for name in ("z_hat", "z"))
    leaf = z_hat.requires_grad_()
    value = boltzmann(leaf, z, torch.tensor(0.01), targets=torch.arange(rows) % 8)
    (grad,) = torch.autograd.grad(65536 * value, leaf)
    wide = z_hat.detach().double().requires_grad_()
    truth = F.cross_entropy(0.01 * wide @ z.double().T, torch.arange(rows) % 8)
    (expected,) = torch.autograd.grad(65536 * truth, wide)
    assert float((grad.double() - expected).norm() / expected.norm()) < 5e-4


# ---- Nothing, and not a number -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["z_hat", "z", "scale", "targets.z", "bias"])
def test_not_finite_is_nan(where: str, value: float, kernel: str) -> None:
    if (where, value) == ("bias", -float("inf")):
        pytest.skip("a column that is left out, below")
    call = soft(9, 12, bias=True)
    of = call.targets.z if where == "targets.z" else call.tensors[where]
    of.view(-1)[0] = value
    assert call.run(boltzmann, FP32)["value"].isnan()
    if where == "targets.z":
        return
    classes = make(Case("classes with bias", 9, 12, 4))
    classes.tensors[where].view(-1)[0] = value
    assert classes.run(boltzmann, FP32)["value"].isnan()


def test_a_product_of_minus_infinity_is_nan(kernel: str) -> None:
    """Its exponential is 0 in every row, so that no sum shows it."""
    call, classes = soft(9, 12, bias=True), make(Case("classes", 9, 12, 4))
    for of in (call, classes):
        of.tensors["z_hat"].abs_()
        of.tensors["z"][5] = -torch.inf
        assert of.run(boltzmann, FP32)["value"].isnan()


def test_a_bias_of_minus_infinity_leaves_a_column_out(kernel: str) -> None:
    call, without = soft(9, 12, bias=True), soft(9, 12, bias=True)
    assert call.targets.column_log_scale is not None
    call.tensors["bias"][3] = call.targets.column_log_scale[3] = -torch.inf
    rest = torch.arange(12) != 3
    without.tensors["z"], without.tensors["bias"] = (
        without.tensors[name][rest] for name in ("z", "bias")
    )
    of = without.targets
    assert of.column_log_scale is not None
    fewer = replace(of, z=of.z[rest], column_log_scale=of.column_log_scale[rest])
    ours, truth = call.run(boltzmann, FP64), Soft(without.tensors, fewer).run(boltzmann, FP64)
    for name in truth:
        grad = ours[name][rest] if name in ("z", "bias") else ours[name]
        torch.testing.assert_close(grad, truth[name])


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_nothing_to_compare(shape: tuple[int, int]) -> None:
    rows, columns = shape
    z_hat, z = torch.randn(rows, 4, requires_grad=True), torch.randn(columns, 4, requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    teacher = SoftTargets(torch.randn(rows, 3), torch.randn(columns, 3), torch.tensor(1.0))
    for targets in (torch.full((rows,), -1), teacher):
        value = boltzmann(z_hat, z, scale, targets=targets)
        assert value.item() == 0
        for grad in torch.autograd.grad(value, (z_hat, z, scale)):
            assert float(grad.abs().sum()) == 0


def test_the_same_bits_every_time(kernel: str) -> None:
    call = soft(40, 70, dtype=torch.bfloat16, bias=True)
    one, other = (call.run(boltzmann, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


ONE = torch.tensor(1.0)


def teacher(**changes: Any) -> SoftTargets:
    return replace(SoftTargets(torch.randn(3, 4), torch.randn(5, 4), ONE), **changes)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rows": (
        {"targets": teacher(z_hat=torch.randn(4, 4))},
        r"targets.z_hat: expected shape \[3, 4",
    ),
    "columns": ({"targets": teacher(z=torch.randn(4, 4))}, r"targets.z: expected shape \[5, 4\]"),
    "dtype": ({"targets": teacher(z=torch.randn(5, 4).double())}, "targets.z: expected dtype"),
    "scale": ({"targets": teacher(scale=torch.ones(3))}, r"targets.scale: expected shape \[\]"),
    "log scale": (
        {"targets": teacher(column_log_scale=torch.ones(3))},
        r"targets.column_log_scale: expected shape \[5\], got \[3\]",
    ),
    "weights": (
        {"targets": teacher(row_weights=torch.ones(5))},
        r"targets.row_weights: expected shape \[3\], got \[5\]",
    ),
    "ids": (
        {"targets": teacher(), "row_ids": torch.arange(3)},
        "row_ids: expected None with SoftTargets",
    ),
    "form": ({"targets": teacher(), "form": "sigmoid"}, "form: expected softmax with SoftTargets"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_wrong_targets_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boltzmann(torch.randn(3, 6), torch.randn(5, 6), ONE, **options)


def test_sinkhorn_refuses_no_iteration() -> None:
    with pytest.raises(ValueError, match="num_iterations: expected at least 1, got 0"):
        sinkhorn_log_scale(torch.randn(3, 6), torch.randn(5, 6), ONE, num_iterations=0)


# ---- The compiled pass ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pass:
    """Arguments of `m3i::boltzmann_rows_pass`: 7 rows of 21 columns, in memory of 32."""

    dtype: torch.dtype
    soft: bool

    def arguments(self, rounded: torch.dtype | None, writes: bool) -> list[Any]:
        rng = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=self.dtype)

        scale, bias = torch.tensor(2.5, dtype=self.dtype), random(21)
        of_targets = [random(7, 32), scale + 1, random(21)] if self.soft else [None] * 3
        ids = torch.tensor([3, -1, 20, 0, 16, 15, 7], dtype=torch.int32)
        half = None if rounded is None else torch.zeros(7, 32, dtype=rounded)
        return [
            2 * random(7, 32),
            of_targets[0],
            21,
            *(scale, bias, of_targets[1], of_targets[2]),
            None if self.soft else ids,
            random(7).abs(),
            *(torch.empty(7, dtype=self.dtype) for _ in range(2)),
            half,
            writes,
        ]


@pytest.mark.parametrize("soft_targets", [False, True])
@pytest.mark.parametrize("half", HALVES)
def test_rounded_gradients_are_those_of_the_wide_ones(
    soft_targets: bool, half: torch.dtype, kernel: str
) -> None:
    if kernel == "cpu":
        pytest.skip("a CPU's products are wide")
    of = Pass(FP32, soft_targets)
    op = torch.ops.m3i.boltzmann_rows_pass.default
    both, alone = of.arguments(half, True), of.arguments(half, False)
    before = alone[0].clone()
    for arguments in (both, alone):
        op(*arguments)
    assert torch.equal(both[11][:, :21], both[0][:, :21].to(half))
    assert torch.equal(alone[11], both[11]) and torch.equal(alone[0], before)
    for result in (9, 10):
        assert torch.equal(alone[result], both[result])


@pytest.mark.parametrize("soft_targets", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_opcheck(soft_targets: bool, dtype: torch.dtype, kernel: str) -> None:
    arguments = Pass(dtype, soft_targets).arguments(None, True)
    torch.library.opcheck(torch.ops.m3i.boltzmann_rows_pass.default, tuple(arguments))
    z_hat, z = (torch.randn(n, 5, dtype=dtype) for n in (9, 12))
    rest: list[Any] = [None] * 4
    ids = None if soft_targets else torch.arange(9, dtype=torch.int32)
    scale = torch.tensor(2.0, dtype=dtype)
    if soft_targets:
        rest = [z_hat.flip(0), z.flip(0), scale, torch.zeros(12, dtype=dtype)]
    torch.library.opcheck(
        torch.ops.m3i.boltzmann_rows.default,
        (z_hat, z, scale, torch.zeros(12, dtype=dtype), ids, *rest, None, [True] * 4),
    )


@pytest.mark.parametrize("row_id", [-2, 21, 2**31 - 1])
def test_a_class_that_is_none_is_refused(row_id: int, kernel: str) -> None:
    arguments = Pass(FP32, False).arguments(None, True)
    arguments[7][6] = row_id
    with pytest.raises(RuntimeError, match=r"targets: .* got|__trap\(\)"):
        torch.ops.m3i.boltzmann_rows_pass.default(*arguments)
