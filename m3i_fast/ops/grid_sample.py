"""dcnv3 by torch's grid_sample, for runtimes that have none of our operators, such as ONNX's.

Every sample is written to memory before they are summed, which the operator avoids. Legend: N
images of H x W pixels and C channels to Yo x Xo pixels, G groups of D channels, K points.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.ops.dcnv3 import Pair
from m3i_fast.ops.library import m3i


def dcnv3_by_grid_sample(
    x: Tensor,  # [N, H, W, C]
    offset: Tensor,  # [N, Yo, Xo, G*K*2] (x, y) pairs
    mask: Tensor,  # [N, Yo, Xo, G*K]
    *,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:  # [N, Yo, Xo, C]
    """Compute `m3i_fast.ops.dcnv3` by F.grid_sample; differentiable, and in the dtype of x.

    Places, samples and sums are at least fp32, since a half has too few numbers for a place. Places
    are normalised to -1..1, which costs a few units in the last place of an image's side. Only
    finite offsets and masks are meant: what else becomes, grid_sample decides.
    """
    kernel, strides, pads, dilations = (
        (pair, pair) if isinstance(pair, int) else pair
        for pair in (kernel_size, stride, padding, dilation)
    )
    dtype, (batch, height, width, channels) = x.dtype, x.shape
    wide = torch.promote_types(dtype, torch.float32)
    x, offset, mask = x.to(wide), offset.to(wide), mask.to(wide)
    rows, columns = offset.shape[1:3]
    point = torch.arange(kernel[0] * kernel[1] - remove_center, device=x.device)
    if remove_center:
        point = point + (point >= kernel[1] // 2 * kernel[0] + kernel[0] // 2)
    of_points = point % kernel[0], point // kernel[0]  # row and column: points go down the columns
    y_YK, x_XK = (
        _normalised(
            torch.arange(count, device=x.device) * strides[d] - pads[d],
            of_points[d] * dilations[d],
            half=dilations[d] * (kernel[d] - 1) // 2,
            offset_scale=offset_scale,
            size=size,
            dtype=x.dtype,
        )
        for d, (count, size) in enumerate(((rows, height), (columns, width)))
    )
    shape = (rows, columns, len(point))
    grid_YXK2 = torch.stack([x_XK.expand(shape), y_YK[:, None].expand(shape)], dim=-1)
    pixels = torch.cat([x.new_full((1,), 2 * offset_scale / size) for size in (width, height)])
    place = offset.unflatten(-1, (groups, -1, 2)) * pixels + grid_YXK2[:, :, None]
    place = place.permute(0, 3, 1, 2, 4, 5).reshape(batch * groups, rows * columns, -1, 2)
    image = x.permute(0, 3, 1, 2).reshape(batch * groups, -1, height, width)
    sample = F.grid_sample(image, place, align_corners=False)  # [N G, D, Yo Xo, K]
    weight = mask.unflatten(-1, (groups, -1))
    weight = weight.softmax(dim=-1) if softmax else weight
    weight = weight.permute(0, 3, 1, 2, 4).reshape(batch * groups, 1, rows * columns, -1)
    out = (sample * weight).sum(dim=-1).view(batch, channels, rows, columns)
    return out.permute(0, 2, 3, 1).to(dtype).contiguous()


def _normalised(
    start: Tensor,  # [Yo or Xo] the first tap of each output pixel, without offsets
    reach: Tensor,  # [K] pixels from the first tap to each point
    *,
    half: int,
    offset_scale: float,
    size: int,
    dtype: torch.dtype,
) -> Tensor:  # [Yo or Xo, K]
    """Return where points lie along one dimension, -1 and 1 at the image's edges."""
    centre = (start + half).to(dtype)[:, None]
    return (2 * (centre + (reach - half).to(dtype) * offset_scale) + 1) / size - 1


def _decomposed(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    offset_scale: float,
    remove_center: bool,
    softmax: bool,
) -> Tensor:
    kernel, strides, pads, dilations = (
        (pair[0], pair[1]) for pair in (kernel_size, stride, padding, dilation)
    )
    return dcnv3_by_grid_sample(
        x,
        offset,
        mask,
        kernel_size=kernel,
        stride=strides,
        padding=pads,
        dilation=dilations,
        groups=groups,
        offset_scale=offset_scale,
        remove_center=remove_center,
        softmax=softmax,
    )


DECOMPOSITIONS: dict[Any, Any] = {m3i.dcnv3.default: _decomposed}
"""Our operators of an encoder by those of torch, for `ExportedProgram.run_decompositions`."""
