"""The step from a picture to the encoder's input, with the pixels that evaluation measures on.

Legend: B pictures, S pixels of the encoder's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3i_fast.config.data import ViewConfig
from m3i_fast.engine.run.data_record import Preprocessing
from m3i_fast.objectives.targets import normalise_views
from m3i_fast.ops.views import centre_squares, make_views, view_specs
from m3i_fast.pipelines.dataset.pictures import rgb_pixels
from m3i_fast.pipelines.optional_imports import require

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Image | Tensor


@dataclass(frozen=True, slots=True)
class Transform:
    """Turn a picture into the encoder's input, [3, S, S] fp32, on the CPU.

    The largest centred square is cut out, resized to S with antialiasing, rounded to uint8 and
    normalised: the bits that `m3i-fast evaluate` measures on where it decodes on the CPU. It can be
    pickled, as workers of a DataLoader need.
    """

    preprocessing: Preprocessing

    def __call__(self, picture: Picture) -> Tensor:  # -> [3, S, S] fp32
        """Transform a PIL image of any mode, upright as its EXIF says, or a tensor [3, H, W] uint8.

        Raises ValueError for any other tensor, and TypeError for what is neither.
        """
        return normalise(self.views([picture]), torch.float32)[0]

    def views(self, pictures: Sequence[Picture] | Tensor) -> Tensor:  # -> [B, 3, S, S] uint8
        """Cut and resize pictures without normalising them; a tensor of size S stays where it is.

        pictures: as `__call__` takes them, or a tensor [B, 3, H, W] uint8. Raises as `__call__`.
        """
        if isinstance(pictures, Tensor) and self._is_batch(pictures):
            return pictures
        size = self.preprocessing.size
        with torch.device("cpu"):  # whatever torch.set_default_device says
            empty = torch.empty(0, 3, size, size, dtype=torch.uint8)
            return torch.cat([empty, *(self._view(picture) for picture in pictures)])

    def _is_batch(self, pictures: Tensor) -> bool:
        """Return whether uint8 pictures have the encoder's size, so that nothing changes."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(
                f"pictures: expected [B, 3, H, W] uint8, got {list(pictures.shape)} "
                f"{pictures.dtype}"
            )
        return pictures.shape[-1] == pictures.shape[-2] == self.preprocessing.size

    def _view(self, picture: Picture) -> Tensor:  # -> [1, 3, S, S] uint8
        pixels = _pixels(picture)
        size = torch.tensor([[pixels.shape[:2]]])  # [1, 1, 2]
        whole = ViewConfig(
            count=1, size=self.preprocessing.size, interpolation=self.preprocessing.interpolation
        )
        (view,) = make_views(
            pixels.flatten(),
            torch.zeros(1, 1, dtype=torch.int64),
            size,
            centre_squares(size[:, 0]),
            views=view_specs(whole),
        )
        return view


def normalise(views: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise whole views as training does: [B, 3, H, W] uint8 -> the same shape in `dtype`."""
    rows = torch.arange(len(views), device=views.device)
    return normalise_views(views.contiguous(), rows, dtype)


def _pixels(picture: Picture) -> Tensor:  # -> [H, W, 3] uint8 on the CPU, contiguous
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
            raise ValueError(
                f"picture: expected [3, H, W] uint8, got {list(picture.shape)} {picture.dtype}"
            )
        return picture.cpu().permute(1, 2, 0).contiguous()
    if not isinstance(picture, require("PIL.Image").Image):
        raise TypeError(
            f"picture: expected a PIL image or a tensor [3, H, W] uint8, got "
            f"{type(picture).__name__}"
        )
    return torch.from_numpy(rgb_pixels(picture))
