"""dcnv3 refuses what it cannot do, and says which argument, what was expected and what given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from m3i_fast.ops import dcnv3

_X = torch.zeros(2, 6, 7, 8)
_OFFSET, _MASK = torch.zeros(2, 3, 7, 36), torch.zeros(2, 3, 7, 18)
_GEOMETRY = (
    r"3 x 3 kernel, stride 2 x 1, padding 1 x 1, dilation 1 x 1, 2 groups, x of \[2, 6, 7, 8\]"
)

# name: (arguments that differ from the right ones, what the message must say)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"x": _X[0]}, r"x: expected shape \[\*, \*, \*, \*\], got \[6, 7, 8\]"),
    "whole numbers": ({"x": _X.int()}, r"x: expected dtype float32, .* got \S*int32"),
    "channels": ({"groups": 3}, r"groups: expected a divisor of the channels of x, 8, got 3"),
    "no groups": ({"groups": 0}, r"groups: .* got 0"),
    "short offset": (
        {"offset": _OFFSET[:, :2].contiguous()},
        rf"offset: expected shape \[2, 3, 7, 36\] \({_GEOMETRY}\), got \[2, 2, 7, 36\]",
    ),
    "flat mask": ({"mask": _MASK[0]}, r"mask: expected shape \[2, 3, 7, 18\] .*, got \[3, 7, 18\]"),
    "mask of 8 points": (
        {"mask": _MASK[..., :16].contiguous()},
        r"mask: expected shape \[2, 3, 7, 18\] .* got \[2, 3, 7, 16\]",
    ),
    "double offset": (
        {"offset": _OFFSET.double()},
        r"offset: expected the dtype of x, \S*float32, got \S*float64",
    ),
    "half mask": ({"mask": _MASK.half()}, r"mask: expected the dtype of x, .* got \S*float16"),
    "no kernel": ({"kernel_size": (0, 3)}, r"kernel_size: expected values from 1 to .* got .*0"),
    "stride 0": ({"stride": 0}, r"stride: expected values from 1 to .* got .*0"),
    "negative padding": ({"padding": (1, -1)}, r"padding: expected values from 0 to .* got .*-1"),
    "dilation 0": ({"dilation": 0}, r"dilation: expected values from 1 to .* got .*0"),
    "even kernel without centre": (
        {"kernel_size": (3, 2), "remove_center": True},
        r"remove_center: expected an odd kernel_size with more than one point, got 3 x 2",
    ),
    "nothing but the centre": (
        {"kernel_size": 1, "remove_center": True},
        r"remove_center: expected an odd kernel_size with more than one point, got 1 x 1",
    ),
    "large kernel": (
        {"kernel_size": 9},
        r"x: expected an image that the kernel fits into, got none of its positions: 9 x 9 kernel",
    ),
    "more offsets a pixel than 63 bits count": (
        {"x": torch.empty(0, 4, 4, 512), "kernel_size": 2**28 - 3, "padding": 2**27 - 2}
        | {"stride": 1, "groups": 512},
        r"kernel_size: expected at most 2\^30 points .* got 268435453 x 268435453 kernel",
    ),
    "more points than 63 bits count twice": (
        {"x": torch.empty(0, 4, 4, 256), "kernel_size": 2**27, "padding": 2**27 - 2}
        | {"stride": 1, "groups": 256},
        r"kernel_size: expected at most 2\^30 points .* got 134217728 x 134217728 kernel",
    ),
    "scale": ({"offset_scale": float("nan")}, r"offset_scale: expected a finite value, got nan"),
}
RIGHT: dict[str, Any] = {
    "x": _X,
    "offset": _OFFSET,
    "mask": _MASK,
    "kernel_size": 3,
    "stride": (2, 1),
    "padding": 1,
    "dilation": 1,
    "groups": 2,
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    dcnv3(**RIGHT)
    with pytest.raises(RuntimeError, match=message):
        dcnv3(**{**RIGHT, **changes})


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_named_without_data(changes: dict[str, Any], message: str) -> None:
    """As in torch.compile."""
    with FakeTensorMode() as mode:
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in {**RIGHT, **changes}.items()
        }
        with pytest.raises(RuntimeError, match=message):
            dcnv3(**arguments)


def test_more_pixels_than_63_bits_count() -> None:
    x = torch.empty(0, 2**61 - 1, 2, 2)
    with pytest.raises(RuntimeError, match=r"x: expected an image of fewer than 2\^31 pixels"):
        dcnv3(**{**RIGHT, "x": x})


@pytest.mark.parametrize("value", [(3, 3, 3), (3,), 3.0, "33", (3, 3.5)])
def test_a_pair_is_an_int_or_two(value: Any) -> None:
    with pytest.raises(ValueError, match="kernel_size: expected an int or \\(height, width\\)"):
        dcnv3(**{**RIGHT, "kernel_size": value})


def test_another_device_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"mask: expected on the device of x \(cpu\), got meta"):
        dcnv3(**{**RIGHT, "mask": _MASK.to("meta")})


def test_the_operators_refuse_strides() -> None:
    rest = ([3, 3], [2, 1], [1, 1], [1, 1], 2, 1.0, False, False)
    with pytest.raises(RuntimeError, match="x: expected a contiguous tensor, got strides"):
        torch.ops.m3i.dcnv3(torch.zeros(2, 8, 6, 7).permute(0, 2, 3, 1), _OFFSET, _MASK, *rest)
    grad_out = torch.zeros(2, 3, 7, 9)[..., :8]
    with pytest.raises(RuntimeError, match="grad_out: expected a contiguous tensor, got strides"):
        torch.ops.m3i.dcnv3_bwd(grad_out, _X, _OFFSET, _MASK, *rest, [True] * 3)
    with pytest.raises(RuntimeError, match=r"grad_out: expected shape \[2, 3, 7, 8\] .*9\]"):
        torch.ops.m3i.dcnv3_bwd(torch.zeros(2, 3, 7, 9), _X, _OFFSET, _MASK, *rest, [True] * 3)
