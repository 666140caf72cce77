"""Raw pixels as features: what a picture's colours alone tell, the least that an encoder adds to.

Legend: B pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from m3i_fast.measuring.encoders.encoder import EncoderSettings, no_text
from m3i_fast.pipelines.dataset.near_duplicates import SIDE
from m3i_fast.pipelines.optional_imports import require

if TYPE_CHECKING:
    from PIL.Image import Image


class PixelEncoder:
    """The largest centred square of a picture, scaled to 12 x 12 pixels by area, in 0..1."""

    name = "pixels"
    digest = hashlib.sha256(f"pixels {SIDE} x {SIDE} box".encode()).hexdigest()
    dtype = torch.float32
    has_text = False
    logit_scale = None
    reads_class_token = False
    step = None
    patch_tokens = None
    trainable = None

    def __init__(self, settings: EncoderSettings) -> None:
        self.device = settings.device
        self.transform: Callable[[Image], Tensor] = small_square

    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return pictures [B, 3, 12, 12] as they are, [B, 432] fp32."""
        return {"mean_1": pictures.to(self.device).flatten(1)}

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Raise ValueError: pixels embed no text."""
        raise no_text(self.name)


def small_square(picture: Image) -> Tensor:  # -> [3, 12, 12] fp32 in 0..1
    """Cut the largest centred square and average it to 12 x 12 pixels."""
    image = require("PIL.Image")
    fitted = require("PIL.ImageOps").fit(picture, (SIDE, SIDE), image.Resampling.BOX)
    pixels = np.asarray(fitted, dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
