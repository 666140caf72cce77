"""Deformable convolution v3: a weighted sum of bilinear samples, for each pixel and group.

Legend: N images of H x W pixels and C channels to Ho x Wo pixels, G groups of D = C / G channels,
K points of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3i_fast.ops.library import contiguous, m3i, refuse_forward_mode

Pair = int | tuple[int, int]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_geometry(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
) -> None:
    pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        torch._check(
            all(least <= value < 2**31 for value in pair),
            lambda name=name, pair=pair, least=least: (
                f"{name}: expected values from {least} to 2^31 - 1, got {pair}"
            ),
        )
    rows, columns = kernel_size
    torch._check(
        not remove_center or (rows % 2 == 1 and columns % 2 == 1 and rows * columns > 1),
        lambda: (
            "remove_center: expected an odd kernel_size with more than one point, "
            f"got {rows} x {columns}"
        ),
    )
    torch._check(
        math.isfinite(offset_scale),
        lambda: f"offset_scale: expected a finite value, got {offset_scale}",
    )


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: list[int], geometry: str) -> None:
    torch._check(
        tensor.dim() == 4 and all(a == b for a, b in zip(tensor.shape, shape, strict=True)),
        lambda: f"{name}: expected shape {shape} ({geometry}), got {list(tensor.shape)}",
    )
    torch._check(
        tensor.dtype == x.dtype,
        lambda: f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}",
    )
    torch._check(
        tensor.device == x.device,
        lambda: f"{name}: expected on the device of x ({x.device}), got {tensor.device}",
    )


def _out_image(
    image: Sequence[int],  # [H, W]
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    geometry: str,
) -> list[int]:  # [Ho, Wo]
    out = []
    for dim, extent in enumerate(image):
        room = extent + 2 * padding[dim] - dilation[dim] * (kernel_size[dim] - 1) - 1
        torch._check(
            room >= 0,
            lambda: (
                "x: expected an image that the kernel fits into, got none of its positions: "
                f"{geometry}"
            ),
        )
        out.append(room // stride[dim] + 1)
    return out


@torch.library.register_fake("m3i::dcnv3")
def _fake(
    x: Tensor,  # [N, H, W, C]
    offset: Tensor,  # [N, Ho, Wo, G*K*2]
    mask: Tensor,  # [N, Ho, Wo, G*K]
    kernel_size: Sequence[int],  # [2]
    stride: Sequence[int],  # [2]
    padding: Sequence[int],  # [2]
    dilation: Sequence[int],  # [2]
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> Tensor:  # [N, Ho, Wo, C]
    torch._check(
        x.dtype in _DTYPES,
        lambda: f"x: expected dtype float32, float64, float16 or bfloat16, got {x.dtype}",
    )
    torch._check(x.dim() == 4, lambda: f"x: expected shape [*, *, *, *], got {list(x.shape)}")
    _check_geometry(kernel_size, stride, padding, dilation, offset_scale, remove_center)
    batch, height, width, channels = x.shape
    torch._check(
        groups > 0 and channels > 0 and channels % groups == 0,
        lambda: f"groups: expected a divisor of the channels of x, {channels}, got {groups}",
    )
    pairs = kernel_size, stride, padding, dilation
    kernel, strides, pads, steps = (" x ".join(map(str, pair)) for pair in pairs)
    geometry = (
        f"{kernel} kernel{' without its centre' if remove_center else ''}, stride {strides}, "
        f"padding {pads}, dilation {steps}, {groups} groups, x of {list(x.shape)}"
    )
    out = _out_image((height, width), *pairs, geometry)
    points = groups * (kernel_size[0] * kernel_size[1] - remove_center)
    torch._check(
        points <= 2**30,
        lambda: f"kernel_size: expected at most 2^30 points of all groups, got {geometry}",
    )
    _check_like("offset", offset, x, [batch, *out, 2 * points], geometry)
    _check_like("mask", mask, x, [batch, *out, points], geometry)
    return x.new_empty((batch, *out, channels))


@torch.library.register_fake("m3i::dcnv3_bwd")
def _fake_bwd(
    grad_out: Tensor,  # [N, Ho, Wo, C]
    x: Tensor,  # [N, H, W, C]
    offset: Tensor,  # [N, Ho, Wo, G*K*2]
    mask: Tensor,  # [N, Ho, Wo, G*K]
    kernel_size: Sequence[int],  # [2]
    stride: Sequence[int],  # [2]
    padding: Sequence[int],  # [2]
    dilation: Sequence[int],  # [2]
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
    needs_grad: Sequence[bool],  # [3] x, offset, mask
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # like x, offset and mask; [0] where not needed
    grads = (
        torch.empty_like(tensor) if needed else tensor.new_empty(0)
        for tensor, needed in zip((x, offset, mask), needs_grad, strict=True)
    )
    return tuple(grads)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offset, mask, *ctx.geometry = inputs
    ctx.save_for_backward(x, offset, mask)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs_grad = ctx.needs_input_grad[:3]
    grads = m3i.dcnv3_bwd.default(
        grad_out.contiguous(),
        *ctx.saved_tensors,
        *ctx.geometry,
        list(needs_grad),
        torch.are_deterministic_algorithms_enabled(),
    )
    of_tensors = [grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)]
    return *of_tensors, *(None for _ in ctx.geometry)


def _backward_twice(ctx: Any, *grads: Tensor) -> None:
    # torch's once_differentiable refuses it likewise.
    raise RuntimeError(
        "dcnv3: expected to be differentiated once, got a gradient of its gradient; call backward "
        "without create_graph"
    )


torch.library.register_autograd("m3i::dcnv3", _backward, setup_context=_setup_context)
torch.library.register_autograd("m3i::dcnv3_bwd", _backward_twice)


def _pair(name: str, value: Pair) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    if not (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(extent, int) for extent in value)
    ):
        raise ValueError(f"{name}: expected an int or (height, width), got {value!r}")
    return list(value)


def _prepared(name: str, tensor: Tensor, autocast_dtype: torch.dtype | None) -> Tensor:
    """Cast a tensor to the dtype of autocast, if any, and make it contiguous."""
    if autocast_dtype is not None and tensor.dtype != torch.float64:
        tensor = tensor.to(autocast_dtype)
    return contiguous("dcnv3", name, tensor)


def dcnv3(
    x: Tensor,  # [N, H, W, C]
    offset: Tensor,  # [N, Ho, Wo, G*K*2] (x, y) pairs
    mask: Tensor,  # [N, Ho, Wo, G*K]
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:  # [N, Ho, Wo, C]
    """Sum samples of x around each pixel, at learned places and with learned weights.

    out[n, oy, ox, g] = sum over k of mask[n, oy, ox, g, k] * sample(x[n, :, :, g], loc_x, loc_y)

        loc_x = ox * stride_w - pad_w + c + (i * dilation_w - c + offset[n, oy, ox, g, k, 0]) * s
        c = dilation_w * (kernel_w - 1) // 2,  s = offset_scale,  and likewise loc_y with j

    Deformable convolution v3, arXiv 2211.05778, equation (2). The samples are bilinear, x is zero
    outside the image, and pixel centres lie at integers. The kernel has K = kernel_h * kernel_w
    points, one less with `remove_center`; k counts them column by column, k = i * kernel_h + j for
    column i and row j. A point outside -1 < loc_x < W, -1 < loc_y < H adds nothing and has zero
    gradients.

    Values that are not finite are not hidden: an offset that is NaN or infinite, or a mask that is
    not finite, also of a point outside, makes the group's channels of the output pixel NaN, as well
    as the gradients by the point's offset and mask and by the group's first pixel of x.

    Computed in float32 (float64 for float64) and rounded once. On the CPU, results and gradients
    have the same bits for any number of threads. On CUDA the gradient by x has the same bits at
    every run after `torch.use_deterministic_algorithms(True)`: it is then summed in integers, to
    2^-47 of the largest product for 56 x 56 pixels and 9 points, and a sum that is not finite is
    NaN. At integer places, where the derivative by the offset jumps, it is the right derivative.
    Differentiable once.

    Under autocast the three tensors are cast to its dtype, except float64 ones.

    Args:
        x: float32, float64, float16 or bfloat16; `offset` and `mask` have its dtype and device. A
            tensor that is not contiguous is copied, with a warning in the log.
        mask: weights; with `softmax` logits, normalised over the K points of each group.
        kernel_size, stride, padding, dilation: ints, or pairs (height, width).
        groups: G, a divisor of C; each group has its own offsets and weights.
        offset_scale: multiplies dilation and offsets alike.
        remove_center: leave out the centre of the kernel, whose extents have to be odd.
        softmax: normalise `mask` in the same pass.

    Raises:
        RuntimeError: an argument is not as described; the message names it, what was expected and
            what was given. Also where a second derivative or one of forward mode is needed.
        ValueError: a pair is neither an int nor two ints.
    """
    refuse_forward_mode("dcnv3", x, offset, mask)
    device = x.device.type
    autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return m3i.dcnv3.default(
        _prepared("x", x, autocast_dtype),
        _prepared("offset", offset, autocast_dtype),
        _prepared("mask", mask, autocast_dtype),
        _pair("kernel_size", kernel_size),
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        groups,
        offset_scale,
        remove_center,
        softmax,
    )
