"""What a picture becomes in a shard, beside Pillow's own reading of it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from m3i_fast.config.data import MAX_PIXELS
from m3i_fast.pipelines.packing.conversion import Stored, convert
from m3i_fast.pipelines.packing.items import Refused
from tests.shared.pipelines.data import smooth_picture

PIXELS = smooth_picture(3, 40, 60)
RGB = Image.fromarray(PIXELS)
GRAY = RGB.convert("L")
ALPHA = RGB.copy()
ALPHA.putalpha(GRAY)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, image_format, **options)
    return content.getvalue()


def stored(content: bytes, **options: Any) -> Stored:
    return convert(content, **{"max_pixels": MAX_PIXELS, **options})


def pixels(content: bytes) -> NDArray[np.int64]:
    """As Pillow's own user would read it."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(np.int64)


KEPT = {
    "jpeg": encoded(RGB, "JPEG"),
    "progressive": encoded(RGB, "JPEG", progressive=True),
    "gray jpeg": encoded(GRAY, "JPEG"),
    "png": encoded(RGB, "PNG"),
    "gray png": encoded(GRAY, "PNG"),
    "upright": encoded(RGB, "JPEG", exif=Image.Exif()),
}


@pytest.mark.parametrize("content", KEPT.values(), ids=KEPT)
def test_what_needs_nothing_keeps_its_bytes(content: bytes) -> None:
    found = stored(content)
    assert found.content == content and found.change == "" and found.size == (40, 60)
    assert found.extension == ("jpg" if content.startswith(b"\xff\xd8") else "png")


def oriented(image_format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, image_format, exif=exif)


LOSSLESS = {
    "palette": encoded(RGB.quantize(16), "PNG"),
    "one bit": encoded(RGB.convert("1"), "PNG"),
    "four bits": encoded(GRAY.quantize(16), "PNG", bits=4),
    "bmp": encoded(RGB, "BMP"),
    "gif": encoded(RGB, "GIF"),
    "tiff": encoded(RGB, "TIFF"),
    "tiff lzw": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "webp": encoded(RGB, "WEBP", lossless=True),
    "icon": encoded(RGB.resize((32, 32)), "ICO", sizes=[(32, 32)]),
    "ppm": encoded(RGB, "PPM"),
    **{f"png {n}": oriented("PNG", n) for n in range(2, 9)},
    **{f"tiff {n}": oriented("TIFF", n) for n in range(2, 9)},
}


@pytest.mark.parametrize("content", LOSSLESS.values(), ids=LOSSLESS)
def test_what_is_lossless_becomes_a_png_of_the_same_pixels(content: bytes) -> None:
    found = stored(content)
    assert found.change and found.extension == "png"
    assert np.array_equal(pixels(found.content), pixels(content))
    assert found.size == pixels(content).shape[:2]


LOSSY = {
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "webp": encoded(RGB, "WEBP"),
    **{f"jpeg {n}": oriented("JPEG", n) for n in range(2, 9)},
}


@pytest.mark.parametrize("content", LOSSY.values(), ids=LOSSY)
def test_what_is_lossy_becomes_a_fine_jpeg_and_upright(content: bytes) -> None:
    found = stored(content)
    assert found.change and found.extension == "jpg"
    assert np.abs(pixels(found.content) - pixels(content)).mean() < 2
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    expected = encoded(upright, "JPEG", quality=95, subsampling="4:4:4")
    assert np.array_equal(pixels(found.content), pixels(expected))
    assert found.size == pixels(content).shape[:2]
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.getexif().get(0x0112) is None


def test_transparency_is_laid_on_white() -> None:
    alpha = np.asarray(GRAY)[:, :, None] / 255
    expected = PIXELS * alpha + 255 * (1 - alpha)
    for content in (encoded(ALPHA, "PNG"), encoded(ALPHA, "WEBP", lossless=True, exact=True)):
        found = stored(content)
        assert found.extension == "png"
        assert np.abs(pixels(found.content) - expected).max() <= 1
    palette = RGB.quantize(16)
    content = encoded(palette, "PNG", transparency=3)
    expected = np.where((np.asarray(palette) == 3)[:, :, None], 255, palette.convert("RGB"))
    assert np.array_equal(pixels(stored(content).content), expected)


def test_of_16_bits_the_upper_8_are_kept() -> None:
    deep = (np.arange(40 * 60, dtype=np.uint16) * 27).reshape(40, 60)
    for image_format in ("PNG", "TIFF", "PPM"):
        found = stored(encoded(Image.fromarray(deep), image_format))
        with Image.open(io.BytesIO(found.content)) as image:
            assert image.mode == "L" and np.array_equal(np.asarray(image), deep >> 8)
    # RGB of 16 bits, which Pillow cannot write.
    colours = np.random.default_rng(0).integers(0, 65536, (40, 60, 3), dtype=np.uint16)
    content = png_of(colours.astype(">u2").tobytes(), 60, 40, depth=16, colour=2)
    assert np.array_equal(pixels(stored(content).content), colours >> 8)


def png_of(raw: bytes, width: int, height: int, *, depth: int, colour: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    line = len(raw) // height
    lines = b"".join(b"\0" + raw[i * line : (i + 1) * line] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first_is_kept(image_format: str) -> None:
    others = [Image.fromarray(smooth_picture(i, 40, 60)) for i in (5, 6)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    content = encoded(RGB, image_format, save_all=True, append_images=others, **options)
    found = stored(content)
    assert found.change and found.extension == "png"
    assert np.array_equal(pixels(found.content), pixels(content))


def test_bytes_between_segments_are_mended() -> None:
    """Pillow skips them, DALI stops at them."""
    content = KEPT["jpeg"]
    odd = content[:2] + content[2:20] + b"\0\0\0" + content[20:]
    assert odd[2:4] == b"\xff\xe0"
    found = stored(odd)
    assert found.change == "bytes between segments"
    assert np.abs(pixels(found.content) - pixels(content)).mean() < 2
    assert stored(found.content).change == ""


def test_exif_that_cannot_be_read_is_left_out() -> None:
    exif = b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff"
    content = KEPT["jpeg"][:2] + exif + KEPT["jpeg"][2:]
    found = stored(content)
    assert found.change == "damaged EXIF" and b"Exif" not in found.content
    assert np.abs(pixels(found.content) - pixels(KEPT["jpeg"])).mean() < 2


# ---- Refused -------------------------------------------------------------------------------------

JPEG, PNG = KEPT["jpeg"], KEPT["png"]
BAD = {
    "empty": (b"", "an empty file"),
    "text": (b"<html>not found</html>", "not a picture: begins with b'<html>no'"),
    "truncated jpeg": (JPEG[: len(JPEG) * 2 // 3], "corrupt or empty image: image file is trunc"),
    "truncated png": (PNG[: len(PNG) // 2], "corrupt or empty image"),
    "header alone": (JPEG[:3], "corrupt or empty image"),
    "checksum": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "corrupt or empty image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC pictures are not read"),
    "float": (
        encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
        "32 bits a pixel, of which nothing says what is white",
    ),
    "png bomb": (PNG[:16] + struct.pack(">II", 30_000, 30_000) + PNG[24:], "corrupt or empty"),
    "true png bomb": (
        png_of(bytes(30_000 * 4000), 30_000, 4_000, depth=8, colour=0),
        "expected at most 89478485 pixels, got 4000 x 30000 = 120000000",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_what_is_no_good_picture_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(Refused) as refused:
        stored(content)
    assert message in refused.value.reason
    assert refused.value.what_to_do


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_a_bomb_is_told_by_its_header(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded: `load` is not called."""
    content = encoded(RGB, image_format)

    def load(self: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(Refused, match="at most 2399 pixels, got 40 x 60 = 2400"):
        stored(content, max_pixels=2399)


def test_a_webp_bomb_is_refused_before_pillow_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes room for the whole picture when it opens one."""
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile._open", pytest.fail)
    for options in ({"lossless": True}, {}, {"exif": b"Exif\0\0"}):
        with pytest.raises(Refused, match="got 40 x 60 = 2400"):
            stored(encoded(RGB, "WEBP", **options), max_pixels=2399)


# ---- For a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [*KEPT.values(), *LOSSY.values(), LOSSLESS["palette"]])
def test_for_a_gpu_all_are_baseline_jpegs_of_a_short_side(content: bytes) -> None:
    found = stored(content, for_gpu=32)
    with Image.open(io.BytesIO(found.content)) as image:
        assert image.format == "JPEG" and "progressive" not in image.info
        assert image.mode == "RGB" and min(image.size) == 32
        # Horizontal and vertical sampling of luma and of both chromas: 4:2:0.
        assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]
        assert image.size == found.size[::-1]
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        scaled = upright.resize(image.size, Image.Resampling.BICUBIC)
        expected = encoded(scaled, "JPEG", quality=90, subsampling="4:2:0")
        assert np.array_equal(pixels(found.content), pixels(expected))


def test_for_a_gpu_nothing_is_scaled_up_or_encoded_twice() -> None:
    small = encoded(RGB, "JPEG", subsampling="4:2:0")
    assert stored(small, for_gpu=40) == (small, "jpg", (40, 60), "", (40, 60))
    assert stored(encoded(RGB, "JPEG", subsampling="4:4:4"), for_gpu=500).size == (40, 60)
    once = stored(KEPT["png"], for_gpu=20)
    assert stored(once.content, for_gpu=20).content == once.content


def test_a_side_too_long_for_a_jpeg_is_refused(tmp_path: Path) -> None:
    long = encoded(Image.new("RGB", (70_000, 2)), "PNG")
    assert stored(long).content == long
    with pytest.raises(Refused, match="sides of at most 65500 for a JPEG, got 2 x 70000"):
        stored(long, for_gpu=2)


def test_a_tiff_is_turned_by_its_own_tag_whatever_its_xmp_says() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    content = encoded(RGB, "TIFF", tiffinfo={274: 6, 700: xmp})
    assert "xmp" in Image.open(io.BytesIO(content)).info
    found = np.asarray(Image.open(io.BytesIO(stored(content).content)))
    assert np.array_equal(found, np.rot90(PIXELS, -1))
