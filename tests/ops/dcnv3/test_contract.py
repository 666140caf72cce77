"""What dcnv3 promises besides its values: autograd, compilation, threads, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from m3i_fast.ops import dcnv3, library, reference
from tests.shared.ops.dcnv3_cases import Config, make, results

FORWARD, BACKWARD = torch.ops.m3i.dcnv3.default, torch.ops.m3i.dcnv3_bwd.default

SMALL = {
    "plain": Config(batch=1, image=(3, 4), group_size=2),
    "everything": Config(
        batch=1,
        image=(3, 4),
        group_size=2,
        kernel=(3, 5),
        stride=(2, 1),
        padding=(2, 3),
        dilation=(1, 2),
        offset_scale=2.0,
        remove_center=True,
        softmax=True,
    ),
    "even kernel": Config(image=(3, 4), group_size=1, kernel=(2, 4), padding=(0, 2), softmax=True),
}
# Enough work for several threads: by pairs of image and group, and by rows.
THREADED = {
    "many pairs": Config(batch=5, image=(24, 20), groups=8),
    "few pairs": Config(batch=1, image=(64, 60), groups=2, softmax=True),
    "large planes": Config(batch=3, image=(130, 140), groups=3),
}


@pytest.fixture(params=SMALL.values(), ids=SMALL.keys())
def config(request: pytest.FixtureRequest) -> Config:
    return request.param


# ---- torch's own checks --------------------------------------------------------------------------


def test_gradcheck(config: Config) -> None:
    inputs, _ = make(config, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(lambda *tensors: dcnv3(*tensors, **config.options), leaves)


def test_opcheck(config: Config) -> None:
    inputs, grad_out = make(config)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    torch.library.opcheck(FORWARD, (*leaves, *config.arguments))
    torch.library.opcheck(BACKWARD, (grad_out, *inputs, *config.arguments, [True] * 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_opcheck_of_other_types(dtype: torch.dtype) -> None:
    config = SMALL["plain"]
    inputs, grad_out = make(config, dtype)
    torch.library.opcheck(FORWARD, (*inputs, *config.arguments))
    needs_grad = [False, True, False]
    torch.library.opcheck(BACKWARD, (grad_out, *inputs, *config.arguments, needs_grad))


def test_compiles_to_one_graph(config: Config) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dcnv3, fullgraph=True, backend="aot_eager")
    inputs, grad_out = make(config)
    expected = results(dcnv3, inputs, grad_out, **config.options)
    for ours, eager in zip(
        results(compiled, inputs, grad_out, **config.options), expected, strict=True
    ):
        assert torch.equal(ours, eager)


def test_compiles_once_for_every_size() -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dcnv3, fullgraph=True, backend=backend, dynamic=True)
    counts = []
    for batch, image in ((2, (5, 6)), (3, (7, 9)), (4, (8, 5))):
        config = Config(batch=batch, image=image)
        inputs, _ = make(config)
        assert torch.equal(compiled(*inputs, **config.options), dcnv3(*inputs, **config.options))
        counts.append(backend.frame_count)
    assert counts[0] == counts[1] == counts[2]


# ---- Gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_needed(wanted: tuple[int, ...]) -> None:
    config = SMALL["everything"]
    inputs, grad_out = make(config)
    needs_grad = [index in wanted for index in range(3)]
    everything = BACKWARD(grad_out, *inputs, *config.arguments, [True] * 3)
    grads = BACKWARD(grad_out, *inputs, *config.arguments, needs_grad)
    for needed, grad, expected in zip(needs_grad, grads, everything, strict=True):
        assert torch.equal(grad, expected) if needed else grad.shape == (0,)
    for index in wanted:
        inputs[index].requires_grad_()
    dcnv3(*inputs, **config.options).backward(grad_out)
    for needed, tensor, expected in zip(needs_grad, inputs, everything, strict=True):
        assert torch.equal(tensor.grad, expected) if needed else tensor.grad is None


def test_a_second_derivative_is_refused() -> None:
    config = SMALL["plain"]
    inputs, _ = make(config)
    leaf = inputs[0].requires_grad_()
    out = dcnv3(*inputs, **config.options)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="dcnv3: expected to be differentiated once"):
        grad.sum().backward()


def test_expanded_gradient() -> None:
    """As the gradient of a sum is."""
    config = SMALL["plain"]
    inputs, grad_out = make(config)
    leaf = inputs[0].requires_grad_()
    dcnv3(*inputs, **config.options).sum().backward()
    expected = results(dcnv3, inputs, torch.ones_like(grad_out), **config.options)[1]
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("far", [3e38, -3e38, 2e9])
def test_offsets_that_lead_far_outside_add_nothing(far: float, softmax: bool) -> None:
    """Even where their place is no float32, and whatever stands elsewhere; no gradient either."""
    config = Config(softmax=softmax, offset_scale=2.0)
    (x, offset, mask), grad_out = make(config)
    lost = torch.rand(offset.shape[:-1] + (36,)) < 0.3
    lost = lost | lost.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # both of a pair
    one = lost.clone()
    one[..., 1::2] = False  # a far x alone is as good
    outside = (x, torch.where(lost, 1000.0, offset), mask)
    expected = results(dcnv3, outside, grad_out, **config.options)
    for where in (lost, one):
        inputs = (x, torch.where(where, far, offset), mask)
        for ours, right in zip(
            results(dcnv3, inputs, grad_out, **config.options), expected, strict=True
        ):
            assert torch.equal(ours, right)
    assert not expected[2][lost].any()


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e9, -3e30])
def test_any_finite_scale(scale: float) -> None:
    """0: the centre, k times; -1: the window mirrored; far beyond the image: the centre alone."""
    config = Config()
    (x, offset, mask), _ = make(config)
    still = torch.zeros_like(offset)
    out = dcnv3(x, still, mask, **{**config.options, "offset_scale": scale})
    weights = mask.unflatten(-1, (2, 9))
    if scale == -1.0:
        mirrored = weights.flip(-1).flatten(-2)
        expected = dcnv3(x, still, mirrored, **config.options)
    else:
        weight = weights.sum(-1) if scale == 0.0 else weights[..., 4]
        expected = (x.unflatten(-1, (2, 16)) * weight[..., None]).flatten(-2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_points_outside_meet_no_infinity() -> None:
    config = Config(batch=1, groups=1, padding=(0, 0), image=(3, 3))
    (x, _, mask), grad_out = make(config)
    x[0, 0, 0] = float("inf")
    offset = torch.full((1, 1, 1, 18), 50.0)
    out, *grads = results(dcnv3, (x, offset, mask), grad_out.fill_(torch.inf), **config.options)
    assert not any(tensor.any() for tensor in (out, *grads))


def test_a_sample_on_the_border_is_outside() -> None:
    """At exactly -1 or the extent nothing is read, also for the derivative; between, something."""
    x = torch.ones(1, 1, 4, 1)
    geometry: dict[str, Any] = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    places = torch.tensor([-1.0, -0.75, 3.25, 4.0])
    offset = torch.stack((places - torch.arange(4), torch.zeros(4)), dim=-1).view(1, 1, 4, 2)
    out, _, grad_offset, grad_mask = results(
        dcnv3, (x, offset, torch.ones(1, 1, 4, 1)), torch.ones(1, 1, 4, 1), **geometry, groups=1
    )
    assert out.flatten().tolist() == [0, 0.25, 0.75, 0]
    assert grad_offset[..., 0].flatten().tolist() == [0, 1, -1, 0]
    assert torch.equal(grad_mask.flatten(), out.flatten())


# By windows and without them (a stride), with whole pixels a step and with halves.
KINKS = {
    "whole": Config(group_size=8),
    "strided": Config(stride=2),
    "scaled": Config(offset_scale=2.0, softmax=True),
    "half": Config(offset_scale=0.5, group_size=15),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", KINKS.values(), ids=KINKS.keys())
def test_derivative_right_below_a_pixel_is_the_left_one(config: Config, dtype: torch.dtype) -> None:
    """Where float32 rounds the fraction to 1, as float64, which does not round it, has it."""
    (x, _, mask), grad_out = make(config, dtype)
    below = torch.tensor([-(2.0**-27), -(2.0**-40), 0.0, -(2.0**-26)], dtype=dtype)
    offset = below[torch.randint(4, (*mask.shape[:3], 2 * mask.shape[-1]))]
    inputs = (x, offset, mask)
    ours = results(dcnv3, inputs, grad_out, **config.options)[2]
    inputs, grad_out = tuple(t.double() for t in inputs), grad_out.double()
    exact = results(dcnv3, inputs, grad_out, **config.options)[2]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    allowed = tolerance * exact.abs().max().item()
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=allowed)


# ---- Threads, types, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("config", THREADED.values(), ids=THREADED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_repetition_change_no_bit(config: Config, dtype: torch.dtype) -> None:
    inputs, grad_out = make(config, dtype)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 8, 2):
            torch.set_num_threads(count)
            runs.append(results(dcnv3, inputs, grad_out, **config.options))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("groups", [2, 3])
def test_a_call_sees_nothing_of_the_one_before(groups: int) -> None:
    """Its memory, which the calls of a thread share: here full of NaN, in other shapes' places."""
    poison = Config(batch=1, image=(40, 50), groups=groups, group_size=20)
    inputs, grad_out = make(poison)
    nan = torch.full_like(inputs[0], torch.nan), *inputs[1:]
    for image, group_size in (((6, 7), 16), ((14, 14), 10), ((3, 4), 32)):
        config = Config(image=image, groups=groups, group_size=group_size)
        mine, grad = make(config)
        expected = results(reference.dcnv3, mine, grad, **config.options)
        assert results(dcnv3, nan, grad_out, **poison.options)[0].isnan().any()
        for ours, right in zip(results(dcnv3, mine, grad, **config.options), expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    config = Config(softmax=True)
    inputs, _ = make(config)
    mixed = (inputs[0].to(dtype), *inputs[1:])  # as a linear layer and a softmax leave them
    with torch.autocast("cpu", dtype=dtype):
        out = dcnv3(*mixed, **config.options)
    assert out.dtype == dtype
    assert torch.equal(out, dcnv3(*(tensor.to(dtype) for tensor in inputs), **config.options))
    compiled = torch.compile(dcnv3, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(compiled(*mixed, **config.options), out)
        assert dcnv3(*(t.double() for t in inputs), **config.options).dtype == torch.float64


def test_strided_inputs_are_copied_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_copied", set())
    config = SMALL["everything"]
    inputs, grad_out = make(config)
    expected = results(dcnv3, inputs, grad_out, **config.options)
    strided = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in inputs]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = dcnv3(*strided, **config.options)
    assert torch.equal(out, expected[0])
    assert [record.args for record in caplog.records] == [
        ("dcnv3", name) for name in ("x", "offset", "mask")
    ]


def test_unaligned_inputs() -> None:
    config = Config()
    inputs, _ = make(config)
    shifted = [
        torch.empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor) for tensor in inputs
    ]
    assert torch.equal(dcnv3(*shifted, **config.options), dcnv3(*inputs, **config.options))
