"""dcnv3 by grid_sample computes the operator, with every option."""

from __future__ import annotations

import pytest
import torch

from m3i_fast.ops import dcnv3, reference
from m3i_fast.ops.grid_sample import dcnv3_by_grid_sample
from tests.shared.ops.dcnv3_cases import GRID, SHAPES, Config, grid, make

# float64 places are exact to 1e-12 of these sides; a sample changes by at most as much a pixel
TOLERANCE = {"rtol": 0.0, "atol": 1e-10}


def assert_equal(config: Config) -> None:
    inputs, _ = make(config, torch.float64)
    got = dcnv3_by_grid_sample(*inputs, **config.options)
    expected = reference.dcnv3(*inputs, **config.options)
    torch.testing.assert_close(got, expected, **TOLERANCE, msg=lambda said: f"{config}: {said}")
    assert got.is_contiguous()


@pytest.mark.parametrize(("kernel", "stride", "dilation"), GRID)
def test_values_are_those_of_the_reference(
    kernel: tuple[int, int], stride: int, dilation: int
) -> None:
    for config in list(grid(kernel, stride, dilation))[::3]:  # of which both centres and softmax
        assert_equal(config)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "no image"])
def test_shapes_that_others_fail_on(name: str) -> None:
    assert_equal(SHAPES[name])


def test_it_is_the_operator_in_float32() -> None:
    config = Config(image=(56, 40), groups=4, softmax=True, offset_scale=2.0, reach=3.0)
    inputs, _ = make(config)
    got = dcnv3_by_grid_sample(*inputs, **config.options)
    torch.testing.assert_close(got, dcnv3(*inputs, **config.options), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_err_as_the_operator_does(dtype: torch.dtype) -> None:
    """Though a half has too few numbers for the places of a picture."""
    config = Config(image=(9, 700), groups=4, softmax=True, offset_scale=2.0, reach=3.0)
    halves = [each.to(dtype) for each in make(config)[0]]
    expected = reference.dcnv3(*(each.double() for each in halves), **config.options)

    def error(out: torch.Tensor) -> float:
        assert out.dtype == dtype
        return float((out.double() - expected).norm() / expected.norm())

    own = error(dcnv3(*halves, **config.options))
    assert error(dcnv3_by_grid_sample(*halves, **config.options)) <= 1.1 * own
