"""Sizes are read from headers as Pillow reads them, nothing large is decoded, and DALI agrees."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.dataset.pictures import check_header, decode, stored_size
from m3i_fast.pipelines.graph.dali import DataNode, fn, pipeline_def, types
from tests.shared.pipelines.data import encode_image, smooth_picture

PIXELS = smooth_picture(1, 75, 101)
PICTURE = Image.fromarray(PIXELS)


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


BASELINE, PNG = encoded(PICTURE, "JPEG", quality=90), encoded(PICTURE, "PNG")
GOOD = {
    "baseline": BASELINE,
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "gray": encoded(PICTURE.convert("L"), "JPEG"),
    "cmyk": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "restarts": encoded(PICTURE, "JPEG", restart_marker_blocks=4),
    "profile of several segments": encoded(PICTURE, "JPEG", icc_profile=bytes(200_000)),
    "fill bytes": BASELINE[:2] + b"\xff" * 20 + BASELINE[2:],
    "bytes after the end": BASELINE + b"junk" * 100,
    "several pictures of a camera": encoded(
        PICTURE, "MPO", save_all=True, append_images=[PICTURE.rotate(90)]
    ),
    "png": PNG,
    "png palette": encoded(PICTURE.quantize(16), "PNG", transparency=3),
    "png of one bit": encoded(PICTURE.convert("1"), "PNG"),
    "png of 16 bits": encode_image(np.arange(75 * 101, dtype=np.uint16).reshape(75, 101)),
    "png of several frames": encoded(
        PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(90)]
    ),
}


def reading(image: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, count: image[offset : offset + count]


def extension(image: bytes) -> str:
    return "png" if image.startswith(b"\x89") else "jpg"


def dali_size(image: bytes) -> tuple[int, ...]:
    """Height and width as the loader decodes it."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph() -> DataNode:
        data: NDArray[np.uint8] = np.frombuffer(image, np.uint8)
        source = fn.external_source(source=lambda _: data, batch=False, dtype=types.UINT8)
        return fn.decoders.image(source, device="cpu", output_type=types.RGB)

    (output,) = graph().run()
    return tuple(np.asarray(output.at(0)).shape[:2])


@pytest.mark.parametrize("kind", GOOD)
def test_the_stored_size_is_pillows_and_dalis(kind: str) -> None:
    image = GOOD[kind]
    with Image.open(io.BytesIO(image)) as opened:
        expected = opened.size[::-1]
    name, *size = stored_size(reading(image))
    assert name == ("PNG" if extension(image) == "png" else "JPEG")
    assert tuple(size) == expected == dali_size(image)
    assert decode(image, extension(image), MAX_PIXELS) == expected


def test_a_few_bytes_are_read_of_a_large_header() -> None:
    read = 0

    def counted(offset: int, count: int) -> bytes:
        nonlocal read
        read += count
        return GOOD["profile of several segments"][offset : offset + count]

    assert stored_size(counted) == ("JPEG", 75, 101)
    assert read < 300


def test_a_turned_picture_is_upright_once_decoded() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(PICTURE, "JPEG", exif=exif)
    assert stored_size(reading(image)) == ("JPEG", 75, 101)
    assert decode(image, "jpg", MAX_PIXELS) == (101, 75)


FRAME = BASELINE.index(b"\xff\xc0")
BAD_HEADERS = {
    "bytes between segments": BASELINE[:20] + b"\0\x11abc" + BASELINE[20:],
    "bytes after the frame": BASELINE.replace(b"\xff\xc4", b"\0\xff\xc4", 1),
    "two frames": BASELINE[: FRAME + 19] + BASELINE[FRAME:],
    "no frame": BASELINE[:FRAME],
    "no pixels": BASELINE[: BASELINE.index(b"\xff\xda") + 4],
}
BAD = BAD_HEADERS | {
    "cut jpeg": BASELINE[:-30],
    "cut png": PNG[:-60],
    "png cut behind its size": PNG[:24],
    "png without an end": PNG[:-12],
    "png of a wrong checksum": PNG[:-18] + bytes([PNG[-18] ^ 1]) + PNG[-17:],
    "png of a wrong header": PNG[:29] + bytes([PNG[29] ^ 1]) + PNG[30:],
}


@pytest.mark.parametrize("kind", BAD)
def test_what_dali_would_stop_at_is_refused(kind: str) -> None:
    """Pillow decodes some of these."""
    with pytest.raises(RuntimeError):
        dali_size(BAD[kind])
    with pytest.raises(ValueError, match="corrupt or empty image: "):
        decode(BAD[kind], extension(BAD[kind]), MAX_PIXELS)
    if kind in BAD_HEADERS:
        with pytest.raises(ValueError, match="expected JPEG segments with one frame header"):
            stored_size(reading(BAD[kind]))


@pytest.mark.matrix
def test_what_passes_is_decoded_by_dali() -> None:
    """Pictures with bytes changed, removed and put in, most of them in the header."""
    rng = random.Random(0)
    passed = 0
    for _ in range(1500):
        image = bytearray(rng.choice(list(GOOD.values())))
        for _ in range(rng.choice([1, 1, 2, 5])):
            place = rng.randrange(min(len(image), rng.choice([700, len(image)])))
            noise = rng.randbytes(rng.randrange(1, 4))
            image[place : place + rng.choice([0, 1, 3])] = rng.choice([noise, b""])
        try:
            size = decode(bytes(image), extension(bytes(image)), 10**6)
        except ValueError:
            continue
        assert tuple(dali_size(bytes(image))) in (size, size[::-1])
        passed += 1
    assert passed > 100


def jpeg_header(height: int, width: int) -> bytes:
    """A JPEG up to its pixels, of which there are none."""
    place = BASELINE.index(b"\xff\xc0") + 5
    size = struct.pack(">HH", height, width)
    return BASELINE[:place] + size + BASELINE[place + 4 : BASELINE.index(b"\xff\xda") + 30]


@pytest.mark.parametrize(("height", "width"), [(9_460, 9_461), (30_000, 30_000), (65_000, 65_001)])
def test_a_huge_picture_is_refused_by_its_header(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks Pillow, which would allocate it."""
    monkeypatch.setattr(
        "m3i_fast.pipelines.dataset.pictures.require", lambda module: pytest.fail(module)
    )
    png = PNG[:16] + struct.pack(">II", width, height) + PNG[24:]
    got = f"got {height} x {width} = {height * width}"
    refused = f"expected at most 89478485 pixels, {got}; raise max_pixels"
    for image in (jpeg_header(height, width), png):
        with pytest.raises(ValueError, match=refused):
            decode(image, extension(image), MAX_PIXELS)
        with pytest.raises(ValueError, match=refused):
            check_header(reading(image), extension(image), MAX_PIXELS)


def test_the_default_is_pillows_limit_and_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for image in (BASELINE, PNG):
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(image))
        assert decode(image, extension(image), 75 * 101) == (75, 101)
