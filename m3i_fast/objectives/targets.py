"""Targets of dense terms, features of the EMA image encoder or pixels, and their normalisation.

Legend: B samples, R rows, P inputs, N cells or patches, p pixels of a patch's side, C channels or
token width, A images from which dense terms predict, M candidate cells.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.objectives.row_statistics import wide
from m3i_fast.ops import mask_mix


def normalise_views(views: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Select and normalise rows in one pass: [B, 3, H, W] uint8, [R] int64 -> [R, 3, H, W]."""
    whole = torch.zeros(rows.shape[0], 1, 1, dtype=torch.uint8, device=views.device)
    return mask_mix(views, whole, rows[:, None].contiguous(), dtype=dtype)


def normalise_patches(
    patches: Tensor,  # [T, 3 p p] uint8, channel after channel, as `cut_patches` has them
    dtype: torch.dtype,
) -> Tensor:  # [T, 3, p, p]
    """Normalise patches as views are, each as a picture of its own."""
    side = round((patches.shape[1] // 3) ** 0.5)
    every = torch.arange(len(patches), device=patches.device)
    return normalise_views(patches.view(-1, 3, side, side), every, dtype)


def blend(
    views: Tensor,  # [B, 3, H, W] uint8
    members: Tensor,  # [P, 2] int64, rows of views
    share: Tensor,  # [P] fp32
    dtype: torch.dtype,
) -> Tensor:  # [P, 3, H, W] dtype
    """Blend pairs of normalised pictures as mixup: share * first + (1 - share) * second, in fp32.

    arXiv 1710.09412, equation (1). Raises ValueError unless each input has two members and a share.
    """
    if members.shape[1:] != (2,):
        raise ValueError(f"members: expected shape [P, 2], got {list(members.shape)}")
    if share.shape != members.shape[:1] or share.dtype != torch.float32:
        raise ValueError(
            f"share: expected shape {list(members.shape[:1])} float32, "
            f"got {list(share.shape)} {share.dtype}"
        )
    first, second = (normalise_views(views, rows, torch.float32) for rows in members.unbind(1))
    return torch.lerp(second, first, share[:, None, None, None]).to(dtype)


def normalise_tokens(tokens: Tensor) -> Tensor:  # [..., C] -> [..., C] fp32
    """Layer-normalise targets without affine, as `ops.gaussian` does in its pass."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


class MomentumEncoder(nn.Module):
    """The EMA copy of the image encoder (paper, figure 1; SiameseIM).

    Returns its patch tokens, without gradient; the likelihood normalises them.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Stay in evaluation mode whatever `mode` is: targets have no stochastic depth."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, N, C]
        return self.encoder.encode_cells(images)


def patchify(images: Tensor, patch_size: int) -> Tensor:  # [B, C, H, W] -> [B, N, p * p * C]
    """Split images into patches as MAE: patches and their pixels row by row, channels last.

    Raises ValueError where `patch_size` does not divide the sides.
    """
    batch, channels, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size: expected a divisor of {height} and {width}, got {patch_size}"
        )
    grid = batch, channels, height // patch_size, patch_size, width // patch_size, patch_size
    return images.reshape(grid).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalised_pixels(images: Tensor, patch_size: int, *, eps: float = 1e-6) -> Tensor:
    """Standardise the pixels of each patch, MAE's target: [B, C, H, W] -> [B, N, p * p * C].

    (x - mean) / sqrt(var + eps) with the unbiased variance of the patch, in fp32 (fp64 for fp64).
    arXiv 2111.06377, section 3, and its authors' code. Raises as `patchify`.
    """
    return standardised(patchify(wide(images), patch_size), eps=eps)


def standardised(patches: Tensor, *, eps: float = 1e-6) -> Tensor:  # [..., p * p * C]
    """Standardise each patch by its own mean and unbiased variance, as `normalised_pixels`."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + eps).rsqrt()


def cell_contrast(views: Tensor, patch_size: int) -> Tensor:  # [B, C, H, W] uint8 -> [B, N] uint8
    """Return the largest range of a channel's values within each cell; 0 for a single colour."""
    side = -1, patch_size
    pixels = views.unflatten(3, side).unflatten(2, side)  # [B, C, g, p, g, p]
    return (pixels.amax((3, 5)) - pixels.amin((3, 5))).amax(1).flatten(1)


def patch_contrast(patches: Tensor) -> Tensor:  # [T, 3 p p] uint8 -> [T] uint8
    """Return the `cell_contrast` of patches, channel after channel."""
    pixels = patches.unflatten(1, (3, -1))
    return (pixels.amax(2) - pixels.amin(2)).amax(1)


def prefer_cells(
    cells: Tensor,  # [A, M] int64, in order of preference
    wanted: Tensor,  # [A, N] bool
    number: int,
) -> Tensor:  # [A, number] int64
    """Select the first wanted cells of each row, repeated where there are fewer than `number`.

    A row without a wanted cell takes its cells in order. Does not synchronise with the host.
    """
    has = wanted.gather(1, cells)
    ordered = cells.gather(1, (~has).to(torch.uint8).argsort(dim=1, stable=True))
    count = has.sum(1, keepdim=True)
    count = torch.where(count > 0, count, cells.shape[1])
    place = torch.arange(number, device=cells.device)
    return ordered.gather(1, place % count)


def autocast_dtype(device_type: str) -> torch.dtype:
    """Return the dtype of an encoder's images: that of autocast where it is on, else fp32."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32
