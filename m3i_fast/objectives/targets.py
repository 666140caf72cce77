"""Targets that the predictors must find: the EMA image encoder's features, or pixels."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.objectives.row_statistics import wide
from m3i_fast.ops import mask_mix


def normalise_views(views: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Chosen rows, normalised in one pass: [B, 3, H, W] uint8, [R] -> [R, 3, H, W] `dtype`."""
    whole = torch.zeros(rows.shape[0], 1, 1, dtype=torch.uint8, device=views.device)
    return mask_mix(views, whole, rows[:, None].contiguous(), dtype=dtype)


def blend(
    views: Tensor,  # [B, 3, H, W] uint8
    members: Tensor,  # [P, 2] int64, rows of views
    share: Tensor,  # [P] fp32
    dtype: torch.dtype,
) -> Tensor:  # [P, 3, H, W] dtype
    """mixup's pictures, normalised: share * first + (1 - share) * second, in fp32.

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
    """The targets as `ops.gaussian` normalises them on its way: layer-norm without affine."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


class MomentumEncoder(nn.Module):
    """EMA copy of the image encoder (paper, figure 1; SiameseIM).

    Its patch tokens, without gradient; the likelihood normalises them.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Stay in evaluation mode: targets see no stochastic depth."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, N, C]
        return self.encoder.encode_cells(images)


def patchify(images: Tensor, patch_size: int) -> Tensor:  # [B, C, H, W] -> [B, N, p * p * C]
    """The pixels of each patch: patches and the pixels in them by row, channels last, as in MAE.

    Raises ValueError where patches do not fill the image.
    """
    batch, channels, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size: expected a divisor of {height} and {width}, got {patch_size}"
        )
    grid = batch, channels, height // patch_size, patch_size, width // patch_size, patch_size
    return images.reshape(grid).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalised_pixels(images: Tensor, patch_size: int, *, eps: float = 1e-6) -> Tensor:
    """[B, C, H, W] any float -> [B, N, p * p * C] fp32: MAE's target.

    Each patch less its mean, over its standard deviation: the root of the variance over
    p * p * C - 1, plus eps. arXiv 2111.06377, section 3, and its authors' code.
    """
    patches = patchify(wide(images), patch_size)
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * (variance + eps).rsqrt()


def cell_contrast(views: Tensor, patch_size: int) -> Tensor:  # [B, C, H, W] uint8 -> [B, N] uint8
    """The widest span of a channel's levels within each cell; 0 where it has one colour."""
    side = -1, patch_size
    pixels = views.unflatten(3, side).unflatten(2, side)  # [B, C, g, p, g, p]
    return (pixels.amax((3, 5)) - pixels.amin((3, 5))).amax(1).flatten(1)


def prefer(
    cells: Tensor,  # [A, M] int64, in order of choice
    wanted: Tensor,  # [A, N] bool
    number: int,
) -> Tensor:  # [A, number] int64
    """The first wanted cells of each row, again and again where they are too few.

    A row without any takes its cells as they come. Nothing waits for the device.
    """
    has = wanted.gather(1, cells)
    ordered = cells.gather(1, (~has).to(torch.uint8).argsort(dim=1, stable=True))
    count = has.sum(1, keepdim=True)
    count = torch.where(count > 0, count, cells.shape[1])
    place = torch.arange(number, device=cells.device)
    return ordered.gather(1, place % count)


def autocast_dtype(device_type: str) -> torch.dtype:
    """Of images that an encoder is given: autocast's, else fp32."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32
