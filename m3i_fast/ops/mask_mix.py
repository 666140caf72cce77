"""Mix pairs of uint8 pictures by a patch mask and normalise them, in one pass over memory.

Legend: B views, P mixed pictures, H x W pixels, h x w cells of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3i_fast.ops.library import m3i

# Of ImageNet's pixels, as fractions of 1 (the constants of torchvision and timm).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    torch._check(
        tensor.dtype == expected, lambda: f"{name}: expected dtype {expected}, got {tensor.dtype}"
    )


@torch.library.register_fake("m3i::mask_mix")
def _fake(
    views: Tensor,  # [B, 3, H, W] uint8
    mask: Tensor,  # [P, h, w] bool
    pairs: Tensor,  # [P, 2] int64
    mean: Sequence[float],  # [3]
    std: Sequence[float],  # [3]
    dtype: torch.dtype,
) -> Tensor:  # [P, 3, H, W] dtype
    _check_dtype("views", views, torch.uint8)
    _check_dtype("mask", mask, torch.bool)
    _check_dtype("pairs", pairs, torch.int64)
    torch._check(
        views.dim() == 4 and views.shape[1] == 3,
        lambda: f"views: expected shape [*, 3, *, *], got {list(views.shape)}",
    )
    torch._check(
        pairs.dim() == 2 and pairs.shape[1] == 2,
        lambda: f"pairs: expected shape [*, 2], got {list(pairs.shape)}",
    )
    num_pairs, (height, width) = pairs.shape[0], views.shape[2:]
    torch._check(
        mask.dim() == 3 and mask.shape[0] == num_pairs,
        lambda: f"mask: expected shape [{num_pairs}, *, *], got {list(mask.shape)}",
    )
    rows, columns = mask.shape[1:]
    torch._check(
        rows > 0 and height % rows == 0 and columns > 0 and width % columns == 0,
        lambda: (
            f"mask: expected a grid that divides views of {height} x {width} pixels, "
            f"got {rows} x {columns} cells"
        ),
    )
    torch._check(
        dtype in (torch.float32, torch.bfloat16),
        lambda: f"dtype: expected float32 or bfloat16, got {dtype}",
    )
    return views.new_empty((num_pairs, 3, height, width), dtype=dtype)


def mask_mix(
    views: Tensor,  # [B, 3, H, W] uint8
    mask: Tensor,  # [P, h, w] bool
    pairs: Tensor,  # [P, 2] int64
    *,
    mean: Sequence[float] = IMAGENET_MEAN,  # [3]
    std: Sequence[float] = IMAGENET_STD,  # [3]
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [P, 3, H, W] dtype
    """Normalised pictures whose cells come from two views each.

    out[p, c, y, x] = (views[v, c, y, x] / 255 - mean[c]) / std[c], where v is pairs[p, 0] if the
    cell of (y, x) is True in mask[p], else pairs[p, 1]. A pair (i, i) is view i, normalised; views
    may appear in any number of pairs, and P may be larger than B or 0.

    It is computed as one fused multiply-add a pixel, x * (1 / (255 std)) + (-mean / std), both
    constants rounded to float32 once, then rounded to `dtype` (to nearest even). Against exact
    arithmetic it is off by at most one unit in the last place of the largest output, like the
    two-step expression, but the two may differ in the last bit. CPU and CUDA give the same bits,
    for any number of threads.

    Not differentiable: its inputs are bytes, a mask and indices, so no gradient is defined.

    Args:
        views: contiguous, on the device of the others.
        mask: contiguous; h divides H and w divides W.
        pairs: contiguous; rows of `views`, not negative.
        mean: of the pixels, as fractions of 1.
        std: of the pixels, as fractions of 1; positive.
        dtype: float32 or bfloat16.

    Raises:
        RuntimeError: an argument is not as described; the message names it, what was expected and
            what was given. On CUDA a pair outside `views` cannot be found without waiting for the
            device: there the kernel stops by a trap, the next synchronisation reports a launch
            failure, and the CUDA context is lost, as after any device-side assertion.
    """
    return m3i.mask_mix.default(views, mask, pairs, mean, std, dtype)
