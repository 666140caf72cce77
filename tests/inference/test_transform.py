"""Pictures of any size and mode become what torchvision makes of their centred square."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from m3i_fast.engine.run.data_record import Preprocessing
from m3i_fast.inference.transform import Transform
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from m3i_fast.pipelines.dataset.pictures import decode_pixels, rgb_pixels

SIZE = 32
TRANSFORM = Transform(
    Preprocessing(size=SIZE, interpolation="cubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)
)


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def stored(picture: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(60 * 40, dtype=np.uint16).reshape(60, 40) * 27)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return stored(noise(40, 61), "JPEG", quality=95, exif=exif)


ENCODED = {
    "landscape": stored(noise(40, 61)),
    "portrait": stored(noise(64, 33)),
    "smaller": stored(noise(9, 12)),
    "of its size": stored(noise(SIZE, SIZE)),
    "transparent": stored(noise(40, 50, "RGBA")),
    "palette": stored(noise(40, 50, "P")),
    "gray": stored(noise(40, 50, "L")),
    "16 bits": stored(sixteen_bits()),
    "turned": turned(),
}


def expected(pixels: Tensor) -> Tensor:  # [3, H, W] uint8 -> [3, S, S] uint8
    height, width = pixels.shape[1:]
    side = min(height, width)
    square = tv.crop(pixels, (height - side) // 2, (width - side) // 2, side, side)
    return tv.resize(square, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)


@pytest.mark.parametrize("name", ENCODED)
def test_a_picture_becomes_torchvisions_resized_square(name: str) -> None:
    pixels = torch.from_numpy(decode_pixels(ENCODED[name], 10**6)).permute(2, 0, 1)
    with Image.open(io.BytesIO(ENCODED[name])) as picture:
        view, normalised = TRANSFORM.views([picture]), TRANSFORM(picture)
    assert torch.equal(view[0], expected(pixels))
    assert torch.equal(TRANSFORM(pixels), normalised)
    theirs = tv.normalize(expected(pixels).double() / 255, [*IMAGENET_MEAN], [*IMAGENET_STD])
    torch.testing.assert_close(normalised.double(), theirs, rtol=0, atol=1e-6)
    assert normalised.dtype == torch.float32


@pytest.mark.parametrize("kind", ["TIFF", "memory"])
def test_inks_of_no_jpeg_are_those_of_pillow(kind: str) -> None:
    """Which are 0 where there is none; a JPEG without Adobe's marker has them the other way."""
    cyan = Image.new("CMYK", (40, 40), (255, 0, 0, 0))
    opened = cyan if kind == "memory" else Image.open(io.BytesIO(stored(cyan, kind)))
    assert rgb_pixels(opened)[0, 0].tolist() == list(opened.convert("RGB").getpixel((0, 0)))
    assert rgb_pixels(Image.new("CMYK", (9, 9)))[0, 0].tolist() == [255, 255, 255]


def test_a_batch_of_another_size_is_cut_and_one_of_the_size_stays() -> None:
    batch = torch.randint(256, (3, 3, 50, 41), dtype=torch.uint8)
    assert torch.equal(TRANSFORM.views(batch), torch.stack([expected(p) for p in batch]))
    of_size = batch[..., :SIZE, :SIZE].contiguous()
    assert TRANSFORM.views(of_size) is of_size
    assert torch.equal(TRANSFORM.views(list(of_size)), of_size)


def test_no_pictures_are_an_empty_batch() -> None:
    assert TRANSFORM.views([]).shape == (0, 3, SIZE, SIZE)
