"""Mix uint8 pictures cell by cell and normalise them, in one pass over memory.

Legend: B views, P mixed pictures of K views each, H x W pixels, h x w cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from m3i_fast.ops.library import m3i

# Mean and deviation of ImageNet's pixels, as fractions of 1 (as torchvision and timm).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_MEMBERS = 255  # views of one picture: a byte of choice names one


def _check_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    torch._check(
        tensor.dtype == expected, lambda: f"{name}: expected dtype {expected}, got {tensor.dtype}"
    )


@torch.library.register_fake("m3i::mask_mix")
def _fake(
    views: Tensor,  # [B, 3, H, W] uint8
    choice: Tensor,  # [P, h, w] uint8
    members: Tensor,  # [P, K] int64
    mean: Sequence[float],  # [3]
    std: Sequence[float],  # [3]
    dtype: torch.dtype,
) -> Tensor:  # [P, 3, H, W] dtype
    _check_dtype("views", views, torch.uint8)
    _check_dtype("choice", choice, torch.uint8)
    _check_dtype("members", members, torch.int64)
    torch._check(
        views.dim() == 4 and views.shape[1] == 3,
        lambda: f"views: expected shape [*, 3, *, *], got {list(views.shape)}",
    )
    torch._check(
        members.dim() == 2, lambda: f"members: expected shape [*, *], got {list(members.shape)}"
    )
    (num_pictures, num_members), (height, width) = members.shape, views.shape[2:]
    torch._check(
        choice.dim() == 3 and choice.shape[0] == num_pictures,
        lambda: f"choice: expected shape [{num_pictures}, *, *], got {list(choice.shape)}",
    )
    torch._check(
        1 <= num_members <= MAX_MEMBERS,
        lambda: f"members: expected 1 to {MAX_MEMBERS} columns, got {num_members}",
    )
    rows, columns = choice.shape[1:]
    torch._check(
        rows > 0 and height % rows == 0 and columns > 0 and width % columns == 0,
        lambda: (
            f"choice: expected a grid that divides views of {height} x {width} pixels, "
            f"got {rows} x {columns} cells"
        ),
    )
    torch._check(
        dtype in (torch.float32, torch.bfloat16),
        lambda: f"dtype: expected float32 or bfloat16, got {dtype}",
    )
    return views.new_empty((num_pictures, 3, height, width), dtype=dtype)


def mask_mix(
    views: Tensor,  # [B, 3, H, W] uint8
    choice: Tensor,  # [P, h, w] uint8
    members: Tensor,  # [P, K] int64
    *,
    mean: Sequence[float] = IMAGENET_MEAN,  # [3]
    std: Sequence[float] = IMAGENET_STD,  # [3]
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [P, 3, H, W] dtype
    """Mix and normalise pictures whose cells come from K views each.

    out[p, c, y, x] = (views[v, c, y, x] / 255 - mean[c]) / std[c], where v = members[p, k] and k is
    the choice[p] of the cell of (y, x). With K = 1 picture p is view members[p, 0], normalised;
    views may appear in any number of pictures, and P may be larger than B or 0.

    Computed as one fused multiply-add a pixel, x * (1 / (255 std)) + (-mean / std), with both
    constants rounded to float32 once, then rounded to `dtype` (to nearest even). The error is at
    most one unit in the last place of the largest output, like that of the two-step expression, but
    the two may differ in the last bit. CPU and CUDA give the same bits, for any number of threads.

    Not differentiable: its inputs are bytes and indices, so no gradient is defined.

    Args:
        views: contiguous, on the device of `choice` and `members`.
        choice: contiguous, each below K; h divides H and w divides W.
        members: contiguous, 1 <= K <= 255; rows of `views`, not negative.
        mean: of the pixels, as fractions of 1.
        std: of the pixels, as fractions of 1; positive.
        dtype: float32 or bfloat16.

    Raises:
        RuntimeError: an argument is not as described; the message names it, what was expected and
            what was given. On CUDA a choice of K or more or a member outside `views` cannot be
            checked without a host synchronisation: the kernel stops by a trap, the next
            synchronisation reports a launch failure, and the CUDA context is lost, as after any
            device-side assertion.
    """
    return m3i.mask_mix.default(views, choice, members, mean, std, dtype)
