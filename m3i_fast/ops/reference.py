"""The operators in plain torch, step by step, which the kernels are tested and timed against.

Functions in float64 are the oracles of the tests. Letters of the legends are those of each op.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.ops.boltzmann import IGNORED
from m3i_fast.ops.dcnv3 import Pair
from m3i_fast.ops.mask_mix import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.ops.views import VIEW_PARAMS, ViewSpec


def add_layer_norm(
    x: Tensor,  # [..., D]
    branch: Tensor | None,  # [..., D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # [..., D], [..., D] dtype
    """Compute `m3i_fast.ops.add_layer_norm` step by step; exact in float64, differentiable."""
    total = x if branch is None else x + branch
    wide = total.to(weight.dtype)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return total, (normed * weight + bias).to(dtype or x.dtype)


def mask_mix(
    views: Tensor,  # [B, 3, H, W] uint8
    choice: Tensor,  # [P, h, w] uint8
    members: Tensor,  # [P, K] int64
    *,
    mean: Sequence[float] = IMAGENET_MEAN,  # [3]
    std: Sequence[float] = IMAGENET_STD,  # [3]
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:  # [P, 3, H, W] dtype
    """Compute `m3i_fast.ops.mask_mix` step by step; exact with float64 for both dtypes."""
    height, width = views.shape[2:]
    mean_C11 = torch.tensor(mean, dtype=compute_dtype, device=views.device).view(3, 1, 1)
    std_C11 = torch.tensor(std, dtype=compute_dtype, device=views.device).view(3, 1, 1)
    views_BCHW = (views.to(compute_dtype) / 255 - mean_C11) / std_C11
    choice_PHW = choice.repeat_interleave(height // choice.shape[1], dim=1)
    choice_PHW = choice_PHW.repeat_interleave(width // choice.shape[2], dim=2)
    mixed_PCHW = views_BCHW[members[:, 0]]
    for k in range(1, members.shape[1]):
        shown_P1HW = (choice_PHW == k)[:, None]
        mixed_PCHW = torch.where(shown_P1HW, views_BCHW[members[:, k]], mixed_PCHW)
    return mixed_PCHW.to(dtype)


def _places(
    offset: Tensor,  # [N, Yo, Xo, G, K] along one dimension
    point_K: Tensor,  # [K] row or column of each point
    index: Tensor,  # [Yo or Xo, 1, ...] of the output pixels, along that dimension
    kernel: int,
    stride: int,
    pad: int,
    dilation: int,
    offset_scale: float,
) -> Tensor:  # [N, Yo, Xo, G, K]
    """Compute the coordinates at which x is sampled, along one dimension."""
    half = dilation * (kernel - 1) // 2
    base = half - pad + index * stride
    return base - half * offset_scale + (point_K * dilation + offset) * offset_scale


def _sample(
    x: Tensor,  # [N, H, W, C]
    x_NYXGK: Tensor,
    y_NYXGK: Tensor,
) -> Tensor:  # [N, Yo, Xo, G, K, D]
    """Sample x bilinearly, each place in the channels of its group; zeros outside the image.

    A place that is NaN counts as (-1, -1), where the first pixel is the only corner in the image.
    """
    batch, height, width, channels = x.shape
    groups = x_NYXGK.shape[3]
    pixels_NPGD = x.reshape(batch, height * width, groups, channels // groups)
    index_N = torch.arange(batch, device=x.device).view(batch, 1, 1, 1, 1)
    index_G = torch.arange(groups, device=x.device).view(groups, 1)
    left, top = (at.detach().floor().nan_to_num(nan=-1.0) for at in (x_NYXGK, y_NYXGK))
    right_weight, bottom_weight = x_NYXGK - left, y_NYXGK - top
    sample = x.new_zeros(())
    for column, weight_x in ((left, 1 - right_weight), (left + 1, right_weight)):
        for row, weight_y in ((top, 1 - bottom_weight), (top + 1, bottom_weight)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            pixel = torch.where(inside, row.long() * width + column.long(), 0)
            corner = torch.where(inside[..., None], pixels_NPGD[index_N, pixel, index_G], 0.0)
            sample = sample + (weight_x * weight_y)[..., None] * corner
    return sample


def dcnv3(
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
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # [N, Yo, Xo, C]
    """Compute `m3i_fast.ops.dcnv3` step by step; exact in float64, differentiable.

    Computes in `compute_dtype`, by default that of x, and rounds to that of x.
    """
    dtype, (height, width) = x.dtype, x.shape[1:3]
    x, offset, mask = (tensor.to(compute_dtype or dtype) for tensor in (x, offset, mask))
    kernel, strides, pads, dilations = (
        (pair, pair) if isinstance(pair, int) else pair
        for pair in (kernel_size, stride, padding, dilation)
    )
    points = [(j, i) for i in range(kernel[1]) for j in range(kernel[0])]  # row and column
    if remove_center:
        points.remove((kernel[0] // 2, kernel[1] // 2))
    point_2K = x.new_tensor(points).T
    offset_NYXGK2 = offset.unflatten(-1, (groups, len(points), 2)).flip(-1)  # (y, x)
    mask_NYXGK = mask.unflatten(-1, (groups, len(points)))
    if softmax:
        mask_NYXGK = mask_NYXGK.softmax(dim=-1)
    # not of int64, which a product with offset_scale would make float32
    wide = torch.promote_types(x.dtype, torch.float32)
    index_Y, index_X = (
        torch.arange(size, device=x.device, dtype=wide) for size in offset.shape[1:3]
    )
    y_NYXGK, x_NYXGK = (
        _places(
            offset_NYXGK2[..., d],
            point_2K[d],
            index,
            *(kernel[d], strides[d], pads[d], dilations[d], offset_scale),
        )
        for d, index in enumerate((index_Y[:, None, None, None], index_X[:, None, None]))
    )
    valid = (x_NYXGK > -1) & (y_NYXGK > -1) & (x_NYXGK < width) & (y_NYXGK < height)
    # NaN where an offset or the mask is not finite: the place of such a point, unless it is inside.
    place_NYXGK = (offset_NYXGK2 * 0).sum(dim=-1) + mask_NYXGK * 0
    counts = valid | place_NYXGK.isnan()
    place_NYXGK = torch.where(counts, place_NYXGK, 0.0)
    sample_NYXGKD = _sample(x, *(torch.where(valid, at, place_NYXGK) for at in (x_NYXGK, y_NYXGK)))
    # A point outside adds nothing, whatever x holds at the place that stands in for it.
    sample_NYXGKD = torch.where(counts[..., None], sample_NYXGKD, 0.0)
    weight_NYXGK = torch.where(counts, mask_NYXGK, 0.0)
    return (weight_NYXGK[..., None] * sample_NYXGKD).sum(dim=-2).flatten(-2).to(dtype)


def boltzmann(
    z_hat: Tensor,  # [N, D]
    z: Tensor,  # [M, D]
    scale: Tensor,  # []
    *,
    targets: Tensor | None = None,  # [N] int64
    row_ids: Tensor | None = None,  # [N] int64
    col_ids: Tensor | None = None,  # [M] int64
    bias: Tensor | None = None,  # [] or [M]
    symmetric: bool = True,
    form: Literal["softmax", "sigmoid"] = "softmax",
    reduction: Literal["mean", "sum"] = "mean",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # [] wide
    """Compute `m3i_fast.ops.boltzmann` from the matrix of all logits; exact in float64.

    Logits are computed in `compute_dtype`, by default that of z_hat, the rest in fp32 (fp64 for
    fp64).
    """
    dtype = compute_dtype or z_hat.dtype
    logits_NM = scale.to(dtype) * (z_hat.to(dtype) @ z.to(dtype).T)
    if bias is not None:
        logits_NM = logits_NM + bias.to(dtype)
    logits_NM = logits_NM if dtype == torch.float64 else logits_NM.float()
    if targets is not None:
        row_ids, col_ids, symmetric = targets, torch.arange(len(z), device=z.device), False
    elif row_ids is None or col_ids is None:
        row_ids = col_ids = torch.arange(len(z), device=z.device)
    if form == "sigmoid":
        return _sigmoid_nll(logits_NM, row_ids, col_ids, reduction)
    value = _softmax_nll(logits_NM, row_ids, col_ids, reduction)
    if symmetric:
        value = 0.5 * (value + _softmax_nll(logits_NM.T, col_ids, row_ids, reduction))
    return value


def _softmax_nll(
    logits_NM: Tensor,
    row_ids: Tensor,  # [N] int64
    col_ids: Tensor,  # [M] int64
    reduction: str,
) -> Tensor:  # []
    positive_NM = row_ids[:, None] == col_ids[None, :]
    valid_N = (row_ids != IGNORED) & positive_NM.any(1)
    # A finite floor: a row of only -inf would put NaN into the gradient of rows that are ignored.
    masked_NM = logits_NM.masked_fill(
        (col_ids == IGNORED)[None, :], torch.finfo(logits_NM.dtype).min
    )
    count_N = positive_NM.sum(1).clamp_min(1)
    mean_positive_N = logits_NM.masked_fill(~positive_NM, 0.0).sum(1) / count_N
    total = (masked_NM.logsumexp(1) - mean_positive_N).masked_fill(~valid_N, 0.0).sum()
    return total / valid_N.sum().clamp_min(1) if reduction == "mean" else total


def _sigmoid_nll(
    logits_NM: Tensor,
    row_ids: Tensor,  # [N] int64
    col_ids: Tensor,  # [M] int64
    reduction: str,
) -> Tensor:  # []
    positive_NM = row_ids[:, None] == col_ids[None, :]
    ignored_NM = (row_ids == IGNORED)[:, None] | (col_ids == IGNORED)[None, :]
    nll_NM = -F.logsigmoid(torch.where(positive_NM, logits_NM, -logits_NM))
    total = nll_NM.masked_fill(ignored_NM, 0.0).sum()
    return total / (row_ids != IGNORED).sum().clamp_min(1) if reduction == "mean" else total


def gaussian(
    z_hat: Tensor,  # [..., D]
    z: Tensor,  # [..., D]
    *,
    sigma: float = 1.0,
    normalise: bool = False,
    eps: float = 1e-5,
    decorrelation_weight: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # [] compute_dtype
    """Compute `m3i_fast.ops.gaussian` step by step; exact in float64, differentiable.

    Computes in `compute_dtype`, by default float32, float64 where z_hat is.
    """
    dtype = compute_dtype or (torch.float64 if z_hat.dtype == torch.float64 else torch.float32)
    pred_RD, target_RD = (x.to(dtype).reshape(-1, x.shape[-1]) for x in (z_hat, z))
    rows, width = pred_RD.shape
    if rows == 0:
        return pred_RD.sum()
    if normalise:
        target_RD = target_RD - target_RD.mean(1, keepdim=True)
        target_RD = target_RD / (target_RD.square().mean(1, keepdim=True) + eps).sqrt()
    value = (pred_RD - target_RD).square().mean() / (2 * sigma**2)
    if not decorrelation_weight:
        return value
    covariance_DD = target_RD.T @ target_RD / rows
    spread = ((pred_RD @ covariance_DD) * pred_RD).sum(1).mean() / width
    return value + decorrelation_weight * spread


# ---- views ---------------------------------------------------------------------------------------

_GRAY = (0.2989, 0.587, 0.114)


def _gray(x: Tensor) -> Tensor:  # [3, S, S] -> [1, S, S], whole levels
    return (x * x.new_tensor(_GRAY).view(3, 1, 1)).sum(0, keepdim=True).floor()


def _turn_hue(x: Tensor, turns: float) -> Tensor:  # [3, S, S], in [0, 255]
    """Turn the hue in HSV: a channel is v - v s clamp(min(k, 4 - k), 0, 1) at its place k of 6."""
    r, g, b = x
    v, low = x.amax(0), x.amin(0)
    span = (v - low).clamp(min=1)
    h = torch.where(v == g, 2 + (b - r) / span, 4 + (r - g) / span)
    h = torch.where(v == r, (g - b) / span, h) / 6 + turns
    k = (torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype).view(3, 1, 1) + 6 * h) % 6
    return v - (v - low) * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x: Tensor, kernel_size: int, sigma: float) -> Tensor:  # [3, S, S]
    half = kernel_size // 2
    places = torch.arange(-half, half + 1, dtype=x.dtype)
    weights = torch.softmax(-0.5 * (places / sigma) ** 2, 0)
    x = F.pad(x[None], (half,) * 4, mode="reflect")[0].unsqueeze(1)
    return F.conv2d(F.conv2d(x, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).squeeze(1)


def _view(image: Tensor, params: Tensor, spec: ViewSpec) -> Tensor:  # [H, W, 3] -> [3, S, S] uint8
    p = dict(zip(VIEW_PARAMS, params.tolist(), strict=True))
    y, x, height, width = (int(p[name]) for name in VIEW_PARAMS[:4])
    crop = image[y : y + height, x : x + width].permute(2, 0, 1)
    size, mode = (spec.size, spec.size), "bicubic" if spec.cubic else "bilinear"
    view = F.interpolate(crop[None], size, mode=mode, antialias=True)[0]
    view = (view.flip(-1) if p["flip"] else view).double()
    factor = {name: p[name] for name in ("brightness", "contrast", "saturation")}
    for step in list(permutations((*factor, "hue")))[int(p["order"])]:
        if step == "hue":
            # 255.999: torchvision's, for the way back to bytes
            turned = _turn_hue(view, p["hue"]) * (255.999 / 255) if p["hue"] else view
            view = turned.floor()
            continue
        gray = _gray(view)
        other = {"brightness": 0 * gray, "contrast": gray.mean(), "saturation": gray}[step]
        view = (factor[step] * view + (1 - factor[step]) * other).clamp(0, 255).floor()
    if p["gray"]:
        view = _gray(view).expand(3, -1, -1)
    if p["sigma"]:
        view = _blur(view, spec.blur_kernel_size, p["sigma"]).round()
    if p["solarize"]:
        view = torch.where(view >= 128, 255 - view, view)
    return view.byte()


def views(
    pixels: Tensor,  # [bytes] uint8
    offset: Tensor,  # [B, M] int64
    image_size: Tensor,  # [B, M, 2] int64
    params: Tensor,  # [B, V, 13] float32
    *,
    views: Sequence[ViewSpec],
) -> tuple[Tensor, ...]:  # V x [B, 3, S, S] uint8
    """Compute `m3i_fast.ops.views.make_views` on the CPU, colours in float64, one view at a time.

    A step that comes out at a whole number may be rounded to the level below it, by either.
    """
    made: list[list[Tensor]] = [[] for _ in views]
    for b, sizes in enumerate(image_size.tolist()):
        images = [
            pixels[at : at + height * width * 3].view(height, width, 3)
            for at, (height, width) in zip(offset[b].tolist(), sizes, strict=True)
        ]
        for v, spec in enumerate(views):
            image = images[1 if v == 1 and len(images) == 2 else 0]
            made[v].append(_view(image, params[b, v], spec))
    return tuple(map(torch.stack, made))
