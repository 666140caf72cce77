"""What gaussian promises besides its values: autograd, compilation, threads, memory, refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from m3i_fast.ops import gaussian, library
from tests.shared.cuda.emulator import emulated
from tests.shared.ops.gaussian_cases import BF16, DTYPES, FP32, FP64, Case, make, results

FORWARD, BACKWARD = torch.ops.m3i.gaussian.default, torch.ops.m3i.gaussian_bwd.default

OPTIONS = {
    "plain": {"normalise": False},
    "normalised": {"normalise": True},
    "decorrelated": {"normalise": False, "decorrelation_weight": 0.7},
    "everything": {"normalise": True, "decorrelation_weight": 0.7, "eps": 0.1},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(params=["cpu", pytest.param("cuda, emulated", marks=pytest.mark.cuda)])
def kernel(request: pytest.FixtureRequest) -> Any:
    if request.param == "cpu":
        yield
        return
    with emulated("gaussian"):
        yield


every_kernel = pytest.mark.usefixtures("kernel")


# ---- torch's own checks --------------------------------------------------------------------------


@every_kernel
@every_option
def test_gradcheck(options: dict[str, Any]) -> None:
    z_hat, z = make(Case(shape=(3, 4), width=6, dtypes=(FP64, FP64)))
    leaf = z_hat.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gaussian(x, z, sigma=0.3, **options), (leaf,))


def check(case: Case) -> None:
    z_hat, z = make(case)
    torch.library.opcheck(FORWARD, (z_hat.clone().requires_grad_(), z, *case.arguments))
    value, *kept = FORWARD(z_hat, z, *case.arguments)
    torch.library.opcheck(BACKWARD, (torch.ones_like(value), z_hat, z, *kept, *case.arguments))


@every_kernel
@every_option
def test_opcheck(options: dict[str, Any]) -> None:
    check(Case(shape=(2, 3), width=8, **options))


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck_of_other_types(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(Case(shape=(2, 3), width=8, dtypes=dtypes, decorrelation_weight=0.7))


@every_option
def test_compiles_to_one_graph(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(gaussian, fullgraph=True, backend="aot_eager")
    inputs = make(Case(dtypes=(BF16, FP32)))
    expected = results(gaussian, *inputs, **options)
    for ours, eager in zip(results(compiled, *inputs, **options), expected, strict=True):
        assert torch.equal(ours, eager)


def test_compiles_once_for_every_size() -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gaussian, fullgraph=True, backend=backend, dynamic=True)
    counts = []
    for shape, width in (((2, 5), 6), ((3, 7), 9), ((4, 8), 5)):
        inputs = make(Case(shape=shape, width=width))
        options = OPTIONS["everything"]
        assert torch.equal(compiled(*inputs, **options), gaussian(*inputs, **options))
        counts.append(backend.frame_count)
    assert counts[0] == counts[1] == counts[2]


# ---- Gradients -----------------------------------------------------------------------------------


def test_a_second_derivative_is_refused() -> None:
    z_hat, z = make(Case())
    leaf = z_hat.requires_grad_()
    (grad,) = torch.autograd.grad(gaussian(leaf, z).square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="gaussian: expected to be differentiated once"):
        grad.sum().backward()


def test_a_target_with_a_gradient_is_refused() -> None:
    z_hat, z = make(Case())
    with pytest.raises(ValueError, match="z: expected a target without gradient, got requires_gr"):
        gaussian(z_hat, z.requires_grad_())


def test_what_is_kept_for_the_backward() -> None:
    """The arguments themselves, two numbers a row, and C: nothing of the arguments' size."""
    case = Case(shape=(40,), width=96, dtypes=(BF16, FP32), decorrelation_weight=0.1)
    z_hat, z = make(case)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gaussian(z_hat.requires_grad_(), z, **case.options)
    places = {tensor.data_ptr() for tensor in kept}
    assert {z_hat.data_ptr(), z.data_ptr()} < places
    shapes = sorted(tuple(tensor.shape) for tensor in kept)
    assert shapes == [(40,), (40,), (40, 96), (40, 96), (96, 96)]
    assert [t.dtype for t in kept if t.shape == (96, 96)] == [BF16]


def most_allocated(function: Callable[[], object]) -> int:
    """Bytes, at one time."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_nothing_of_the_arguments_size_is_allocated(dtype: torch.dtype) -> None:
    """But the gradient; with decorrelation also one more, in the arguments' own dtype, at a time.

    A copy in float32 would be 2 MB; torch's product of matrices has some scratch of its own.
    """
    z_hat, z = make(Case(shape=(4096,), width=128, dtypes=(dtype, dtype)))
    leaf = z_hat.detach().requires_grad_()
    moments, square, part = 4096 * 4 * 2, 128 * 128 * 4, 1024 * 128 * 4
    for weight, in_forward, in_backward in (
        (0.0, 0, 0),
        (0.1, z.nbytes + 4 * square + part * (dtype == BF16), z_hat.nbytes + 4 * square),
    ):
        forward = partial(gaussian, leaf, z, normalise=True, decorrelation_weight=weight)
        assert moments <= most_allocated(forward) <= in_forward + moments + 1024
        value = forward()
        backward = partial(torch.autograd.grad, value, leaf)
        assert z_hat.nbytes <= most_allocated(backward) <= in_backward + z_hat.nbytes + 1024


# ---- Threads, autocast, strides ------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP64, FP64)])
def test_threads_and_repetition_change_no_bit(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = make(Case(shape=(7, 61), width=700, dtypes=dtypes))
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 8, 2):
            torch.set_num_threads(count)
            runs.append(results(gaussian, *inputs, normalise=True))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@every_kernel
@every_option
def test_autocast_changes_nothing(options: dict[str, Any]) -> None:
    inputs = make(Case(shape=(3, 50), width=24))
    expected = results(gaussian, *inputs, **options)
    with torch.autocast("cpu", dtype=BF16):
        ours = results(gaussian, *inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_strided_inputs_are_copied_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_copied", set())
    inputs = make(Case())
    expected = results(gaussian, *inputs, normalise=True)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            leaf = strided[0].requires_grad_()
            value = gaussian(leaf, strided[1], normalise=True)
    (grad,) = torch.autograd.grad(3 * value, leaf)
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])
    assert [record.args for record in caplog.records] == [("gaussian", "z_hat"), ("gaussian", "z")]


# ---- Refusals ------------------------------------------------------------------------------------

_Z_HAT, _Z = torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)

# name: (arguments that differ from the right ones, what the message must say)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"z": _Z[:, :2]}, r"z: expected shape \[2, 3, 8\], got \[2, 2, 8\]"),
    "dimensions": ({"z": _Z.flatten(0, 1)}, r"z: expected shape \[2, 3, 8\], got \[6, 8\]"),
    "no dimension": (
        {"z_hat": torch.zeros(()), "z": torch.zeros(())},
        r"z_hat: expected shape \[\.\.\., D\] with D > 0, got \[\]",
    ),
    "no width": (
        {"z_hat": _Z[..., :0], "z": _Z[..., :0]},
        r"z_hat: expected shape \[\.\.\., D\] with D > 0, got \[2, 3, 0\]",
    ),
    "whole numbers": ({"z_hat": _Z.int()}, r"z_hat: expected dtype float32, .* got \S*int32"),
    "whole targets": ({"z": _Z.long()}, r"z: expected dtype float32, .* got \S*int64"),
    "double targets": (
        {"z": _Z.double()},
        r"z: expected float64 beside float64 alone, got \S*float64 beside \S*float32",
    ),
    "double predictions": ({"z_hat": _Z.double()}, r"z: expected float64 .* got \S*float32 beside"),
    "no deviation": ({"sigma": 0.0}, r"sigma: expected a finite value > 0, got 0"),
    "infinite deviation": ({"sigma": float("inf")}, r"sigma: expected a finite value .* got inf"),
    "no eps": ({"eps": 0.0}, r"eps: expected a finite value > 0, got 0"),
    "weight": (
        {"decorrelation_weight": float("nan")},
        r"decorrelation_weight: expected a finite value, got nan",
    ),
}
RIGHT: dict[str, Any] = {"z_hat": _Z_HAT, "z": _Z}


@every_kernel
@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    gaussian(**RIGHT)
    with pytest.raises(RuntimeError, match=message):
        gaussian(**{**RIGHT, **changes})


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_named_without_data(changes: dict[str, Any], message: str) -> None:
    """As in torch.compile."""
    with FakeTensorMode() as mode:
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in {**RIGHT, **changes}.items()
        }
        with pytest.raises(RuntimeError, match=message):
            gaussian(**arguments)


def test_another_device_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"z: expected on the device of z_hat \(cpu\), got meta"):
        gaussian(_Z_HAT, _Z.to("meta"))


def test_the_operators_refuse_what_they_cannot_read() -> None:
    rest = [1.0, True, 1e-5, 0.5]
    with pytest.raises(RuntimeError, match="z_hat: expected a contiguous tensor, got strides"):
        FORWARD(torch.zeros(3, 2, 8).transpose(0, 1), _Z, *rest)
    value, mean, rstd, covariance = FORWARD(_Z_HAT, _Z, *rest)
    right = {"grad_out": value, "z_hat": _Z_HAT, "z": _Z, "mean": mean, "rstd": rstd}
    right["covariance"] = covariance
    for name, tensor, message in (
        ("grad_out", value[None], r"shape \[\], got \[1\]"),
        ("grad_out", value.double(), r"dtype float32, got float64"),
        ("mean", mean[:5], r"shape \[6\], got \[5\]"),
        ("rstd", rstd.double(), r"dtype float32, got float64"),
        ("covariance", covariance[:1], r"shape \[8, 8\], got \[1, 8\]"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected {message}"):
            BACKWARD(*{**right, name: tensor}.values(), *rest)
