"""dcnv3's CUDA kernels under the emulator, and on a GPU where there is one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from m3i_fast.ops import dcnv3
from tests.ops.dcnv3.test_contract import (  # noqa: F401  run here on the other kernel
    SMALL,
    test_a_sample_on_the_border_is_outside,
    test_derivative_right_below_a_pixel_is_the_left_one,
    test_offsets_that_lead_far_outside_add_nothing,
    test_opcheck_of_other_types,
    test_points_outside_meet_no_infinity,
    test_unaligned_inputs,
)
from tests.shared.cuda.emulator import emulated
from tests.shared.ops.dcnv3_cases import (
    GRID,
    KERNELS,
    MANY_IMAGES,
    SHAPES,
    Config,
    assert_right,
    grid,
    make,
    results,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors lie; under the emulator, on the CPU."""
    if getattr(request, "param", "emulated") == "cuda":
        yield "cuda"
        return
    with emulated("dcnv3"):
        yield "cpu"


on_every_device = pytest.mark.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_every_device
@pytest.mark.parametrize(("kernel", "stride", "dilation"), GRID)
def test_cuda_is_as_accurate_as_torch(
    kernel: tuple[int, int], stride: int, dilation: int, device: str
) -> None:
    for config in grid(kernel, stride, dilation):
        assert_right(dcnv3, config, torch.float32, device)


@on_every_device
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_is_as_accurate_as_torch_in_other_types(
    kernel: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    for config in itertools.islice(grid(kernel, 1, 1), 1, None, 3):
        assert_right(dcnv3, config, dtype, device)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_cuda_shapes(name: str, dtype: torch.dtype, device: str) -> None:
    assert_right(dcnv3, SHAPES[name], dtype, device)


# More points than a warp holds, in each number of lanes; channels in several passes.
CHUNKED = {
    "two chunks, 32 lanes": Config(
        batch=1, image=(5, 4), kernel=(9, 9), padding=(4, 4), group_size=33, groups=1, softmax=True
    ),
    "six chunks, one lane": Config(
        image=(4, 3), kernel=(7, 7), padding=(3, 3), group_size=1, groups=3, softmax=True
    ),
    "four passes": Config(batch=1, image=(3, 4), group_size=101, groups=2, softmax=True),
    "passes and chunks": Config(
        batch=1, image=(3, 3), kernel=(9, 9), padding=(4, 4), group_size=67, groups=1, softmax=True
    ),
}


@on_every_device
@pytest.mark.parametrize("config", CHUNKED.values(), ids=CHUNKED.keys())
def test_more_points_and_channels_than_fit_at_once(config: Config, device: str) -> None:
    assert_right(dcnv3, config, torch.float32, device)


# Strips, segments and slices of the windows that the gradient by x is summed in, full and in part.
WINDOWS = {
    "three strips, four segments": Config(batch=1, image=(15, 19), softmax=True),
    "half a slice": Config(image=(6, 7), groups=3),
    "five groups of 8": Config(image=(5, 9), group_size=8, groups=5),
    "one group of 32": Config(image=(9, 4), group_size=32, groups=1),
    "points in chunks": Config(batch=1, image=(5, 6), kernel=(5, 5), padding=(2, 2), softmax=True),
    "most points outside": Config(image=(12, 12), reach=6.0),
    "no padding": Config(image=(9, 11), padding=(0, 0)),
}


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", WINDOWS.values(), ids=WINDOWS.keys())
def test_windows(config: Config, dtype: torch.dtype, device: str) -> None:
    assert_right(dcnv3, config, dtype, device)


@on_every_device
def test_windows_keep_what_is_not_finite_where_it_is(device: str) -> None:
    """Of a gradient, a mask and an offset, as the kernel without windows does (stride 2 has none).

    Each output pixel of the second call is one of the first, and the gradient of all others zero.
    """
    config = Config(batch=2, image=(9, 9), groups=2)
    (x, offset, mask), grad_out = make(config)
    grad_out[0, 2, 4, 5], grad_out[1, 0, 0, 20] = torch.nan, torch.inf
    mask[1, 4, 4, 3], offset[1, 6, 2, 5] = -torch.inf, torch.nan
    mask.view(2, 9, 9, 2, 9)[0, 8, 8, 1] = torch.nan
    every = slice(None, None, 2)
    few = Config(batch=2, image=(9, 9), groups=2, stride=2)
    sparse = torch.zeros_like(grad_out)
    sparse[:, every, every] = grad_out[:, every, every]
    kept = torch.zeros_like(mask)
    kept[:, every, every] = mask[:, every, every]
    still = torch.zeros_like(offset)
    still[:, every, every] = offset[:, every, every]
    windowed = results(dcnv3, tuple(t.to(device) for t in (x, still, kept)), sparse.to(device),
                       **config.options)  # fmt: skip
    parts = (x, *(t[:, every, every].contiguous() for t in (offset, mask)))
    direct = results(dcnv3, tuple(t.to(device) for t in parts), grad_out[:, every, every]
                     .contiguous().to(device), **few.options)  # fmt: skip
    finite = direct[1].isfinite()
    assert not finite.all() and torch.equal(windowed[1].isfinite(), finite)
    torch.testing.assert_close(windowed[1][finite], direct[1][finite])


@on_every_device
@pytest.mark.cuda
@pytest.mark.nightly
def test_more_images_than_a_grid_has_rows(device: str) -> None:
    assert_right(dcnv3, MANY_IMAGES, torch.float32, device)


@on_every_device
@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL.keys())
def test_cuda_gradcheck(config: Config, device: str) -> None:
    leaves = [tensor.to(device).requires_grad_() for tensor in make(config, torch.float64)[0]]
    assert torch.autograd.gradcheck(
        lambda *tensors: dcnv3(*tensors, **config.options), leaves, nondet_tol=1e-12
    )


@on_every_device
def test_images_do_not_see_each_other(device: str) -> None:
    """The last block of an image is not full: its idle threads are not the next image's."""
    config = Config(batch=3, image=(5, 3), groups=3)
    inputs, grad_out = (t for t in make(config))
    whole = dcnv3(*(t.to(device) for t in inputs), **config.options)
    for image in range(3):
        part = [tensor[image : image + 1].to(device) for tensor in inputs]
        assert torch.equal(dcnv3(*part, **config.options), whole[image : image + 1])


@on_every_device
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_cuda_computes_the_gradients_that_are_needed(
    wanted: tuple[int, ...], deterministic: bool, device: str
) -> None:
    config = SMALL["everything"]
    inputs, grad_out = make(config)
    arguments = [t.to(device) for t in (grad_out, *inputs)], config.arguments
    needs_grad = [index in wanted for index in range(3)]
    backward = torch.ops.m3i.dcnv3_bwd.default
    everything = backward(*arguments[0], *arguments[1], [True] * 3, True)
    grads = backward(*arguments[0], *arguments[1], needs_grad, deterministic)
    for needed, grad, expected in zip(needs_grad, grads, everything, strict=True):
        if needed:
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
        else:
            assert grad.shape == (0,)


# ---- The same bits at every run ------------------------------------------------------------------


@on_every_device
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_mode_is_as_accurate(dtype: torch.dtype, device: str) -> None:
    for config in itertools.islice(grid((3, 3), 1, 1), 2, None, 8):
        assert_right(dcnv3, config, dtype, device)
    assert_right(dcnv3, CHUNKED["six chunks, one lane"], dtype, device)


@on_every_device
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_mode_repeats_every_bit(dtype: torch.dtype, device: str) -> None:
    config = Config(batch=2, image=(7, 9), reach=3.0, softmax=True)
    inputs, grad_out = make(config, dtype)
    inputs, grad_out = tuple(t.to(device) for t in inputs), grad_out.to(device)
    first, second = (results(dcnv3, inputs, grad_out, **config.options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_every_device
@pytest.mark.usefixtures("deterministic")
def test_deterministic_sum_does_not_depend_on_its_order(device: str) -> None:
    """Nine terms on one pixel, of which float32 would lose the smallest in most orders."""
    terms = torch.tensor([2.0**26, 1.0, -(2.0**26), 0.25, 2.0**27, -1.0, 0.5, -(2.0**27), 0.125])
    x = torch.zeros(1, 1, 9, 1, device=device, requires_grad=True)
    offset = torch.zeros(1, 1, 9, 2, device=device)
    offset[..., 0] = 4 - torch.arange(9)
    geometry = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    for _ in range(4):
        terms = terms[torch.randperm(9)]
        out = dcnv3(x, offset, torch.ones(1, 1, 9, 1, device=device), **geometry)
        (grad,) = torch.autograd.grad(out, x, terms.view(1, 1, 9, 1).to(device))
        assert grad.flatten().tolist() == [0, 0, 0, 0, 0.875, 0, 0, 0, 0]


@on_every_device
@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_keeps_what_is_not_finite_where_it_is(device: str) -> None:
    config = Config(batch=2, image=(6, 6), groups=2)
    inputs, grad_out = make(config)
    grad_out[0, 2, 3, 5], grad_out[1, 0, 0, 20] = torch.nan, torch.inf
    expected = results(dcnv3, inputs, grad_out, **config.options)
    torch.use_deterministic_algorithms(False)
    inputs, grad_out = tuple(t.to(device) for t in inputs), grad_out.to(device)
    usual = results(dcnv3, inputs, grad_out, **config.options)
    finite = usual[1].isfinite()
    assert torch.equal(expected[1].to(device).isfinite(), finite) and not finite.all()
    torch.testing.assert_close(expected[1].to(device)[finite], usual[1][finite])


# ---- On a GPU alone ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_more_than_2_to_the_31_elements_on_a_gpu(device: str) -> None:
    batch = 2**15 + 3
    config = Config(groups=16, stride=8)
    x = torch.zeros(batch, 8, 8, 1024, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    x[-1] = torch.randn(8, 8, 1024)
    offset = torch.randn(batch, 1, 1, 288, dtype=torch.bfloat16, device=device)
    mask = torch.rand(batch, 1, 1, 144, dtype=torch.bfloat16, device=device)
    out = dcnv3(x, offset, mask, **config.options)
    last = [tensor[-1:].contiguous() for tensor in (x, offset, mask)]
    assert torch.equal(out[-1:], dcnv3(*last, **config.options)) and out[-1].any()
    assert not out[:-1].any()
