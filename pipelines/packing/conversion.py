"""From any picture that Pillow reads to one that shards hold: the rule, and the refusals.

A JPEG (gray or RGB, upright) and a PNG (8 bits gray or RGB, no transparency, one picture) keep
their bytes. Anything else is decoded and encoded again: a lossy source as JPEG (quality 95, 4:4:4),
a lossless one as PNG. EXIF's orientation is applied; transparency is laid on white; of 16 bits the
upper 8 are kept; of several pictures in a file the first; CMYK, palettes and others become RGB.
Colour profiles are not applied. With a short side S (`for_gpu`) every picture becomes a baseline
JPEG with 4:2:0 subsampling, scaled down (never up) so that its short side is S.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from m3i_fast.pipelines.dataset.pictures import check_header, exif_orientation, turned
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.packing.items import Refused

LOSSY_QUALITY = 95
GPU_QUALITY = 90
LONGEST_SIDE = 65_500  # of a JPEG
# What a file begins with: Pillow's name, and the module and class that read it.
FORMATS = {
    b"\xff\xd8\xff": ("JPEG", "JpegImagePlugin", "JpegImageFile"),
    b"\x89PNG\r\n\x1a\n": ("PNG", "PngImagePlugin", "PngImageFile"),
    b"GIF8": ("GIF", "GifImagePlugin", "GifImageFile"),
    b"RIFF": ("WEBP", "WebPImagePlugin", "WebPImageFile"),
    b"BM": ("BMP", "BmpImagePlugin", "BmpImageFile"),
    b"II*\0": ("TIFF", "TiffImagePlugin", "TiffImageFile"),
    b"MM\0*": ("TIFF", "TiffImagePlugin", "TiffImageFile"),
    b"\0\0\1\0": ("ICO", "IcoImagePlugin", "IcoImageFile"),
    **{b"P%d" % n: ("PPM", "PpmImagePlugin", "PpmImageFile") for n in range(1, 7)},
}
KNOWN_BY_NAME = {
    b"ftyphei": "HEIC",
    b"ftypmif": "HEIC",
    b"ftypavi": "AVIF",
    b"jP  ": "JPEG 2000",
    b"\n\x87\n": "JPEG 2000",
}
_GRAY_DEPTHS = ("I;16", "I;16L", "I;16B", "I;16N")


class Stored(NamedTuple):
    """A picture as a shard holds it."""

    content: bytes
    extension: Literal["jpg", "png"]
    size: tuple[int, int]  # height, width
    change: str  # why it was encoded again; empty: its bytes are kept
    given_size: tuple[int, int]  # of the upright picture before it was scaled


def convert(content: bytes, *, max_pixels: int, for_gpu: int | None = None) -> Stored:
    """Decode a picture, and return it as a shard holds it, by the rule of this module.

    Raises Refused for what is none, is damaged, or has more than `max_pixels` pixels, which is told
    by its header before anything is decoded.
    """
    with _opened(content, max_pixels) as (picture, name):
        change = _change(picture, name, content, max_pixels)
        if for_gpu is not None:
            change = _gpu_change(picture, change, for_gpu)
        picture.load()
        if not change:
            width, height = picture.size
            size = height, width
            return Stored(content, "jpg" if name == "JPEG" else "png", size, "", size)
        return _encode(_plain(picture, name), _is_lossy(name, content), change, for_gpu)


@contextmanager
def _opened(content: bytes, max_pixels: int) -> Iterator[tuple[Any, str]]:
    """Open a picture, and yield it with Pillow's name of its format; raises as `convert`."""
    name, module, reader = _format(content)
    if name == "WEBP":
        _check_size(_webp_size(content), max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make = getattr(require(f"PIL.{module}"), reader)
            if name == "PNG":
                make(io.BytesIO(content)).verify()  # checksums, which decoding leaves unread
            with make(io.BytesIO(content)) as picture:
                _check_size(picture.size, max_pixels)
                yield picture, name
    except Refused:
        raise
    except MemoryError:
        raise Refused("does not fit into memory", "scale the picture down") from None
    except Exception as error:  # Pillow raises a dozen types on corrupt data
        reason = str(error) or type(error).__name__
        raise Refused(f"corrupt or empty image: {reason}", "replace or remove it") from error


def upright_picture(content: bytes, *, max_pixels: int) -> Any:
    """Decode a picture to Pillow's, upright RGB by the rule of this module; raises as `convert`."""
    with _opened(content, max_pixels) as (picture, name):
        return _plain(picture, name).convert("RGB")


def small_picture(content: bytes, *, max_pixels: int, least_side: int) -> Any:
    """Decode a picture to Pillow's, upright RGB by the rule of this module; raises as `convert`.

    A JPEG is decoded at a half, quarter or eighth of its size, if that leaves `least_side` pixels.
    """
    with _opened(content, max_pixels) as (picture, name):
        picture.draft(None, (least_side, least_side))
        return _plain(picture, name).convert("RGB")


def _format(content: bytes) -> tuple[str, str, str]:
    if not content:
        raise Refused("an empty file", "replace or remove it")
    for start, found in FORMATS.items():
        if content.startswith(start) and (found[0] != "WEBP" or content[8:12] == b"WEBP"):
            return found
    for mark, name in KNOWN_BY_NAME.items():
        if mark in content[:16]:
            raise Refused(f"{name} pictures are not read", "convert it to JPEG or PNG")
    raise Refused(f"not a picture: begins with {content[:8]!r}", "replace or remove it")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raise Refused for a (width, height) of too many pixels, or of none."""
    width, height = size
    if width * height > max_pixels:
        raise Refused(
            f"expected at most {max_pixels} pixels, got {height} x {width} = {height * width}",
            "scale it down, or raise --max-pixels (and data.max_pixels of the run)",
        )
    if min(width, height) < 1:
        raise Refused(f"corrupt or empty image: {height} x {width} pixels", "replace or remove it")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Read (width, height), for which Pillow would allocate a picture before it tells them."""
    kind, body = content[12:16], content[20:30]
    if len(body) < 10:
        raise Refused("corrupt or empty image: a truncated WebP", "replace or remove it")
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", body[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _is_lossy(name: str, content: bytes) -> bool:
    return name == "JPEG" or (name == "WEBP" and b"VP8L" not in _webp_chunks(content))


def _webp_chunks(content: bytes) -> set[bytes]:
    """Return the kinds of chunks of a WebP, those inside of an animation's first frame included."""
    kinds, place = set(), 12
    while place + 8 <= len(content):
        kind = content[place : place + 4]
        kinds.add(kind)
        if kind == b"ANMF":
            kinds.add(content[place + 24 : place + 28])
            break
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return kinds


def _change(picture: Any, name: str, content: bytes, max_pixels: int) -> str:
    """Return why a picture cannot keep its bytes; empty: it can."""
    if name not in ("JPEG", "PNG"):
        return name
    if getattr(picture, "is_animated", False):
        return "animation"
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        return "transparency"
    if name == "PNG" and (content[24] != 8 or content[25] not in (0, 2)):
        return "palette" if content[25] == 3 else f"{content[24]} bits"
    if picture.mode not in ("L", "RGB"):
        return str(picture.mode)
    if (orientation := _orientation(picture)) != 1:
        return "orientation" if orientation else "damaged EXIF"
    try:
        check_header(
            lambda offset, count: content[offset : offset + count],
            "jpg" if name == "JPEG" else "png",
            max_pixels,
        )
    except ValueError:  # which Pillow reads, and DALI does not
        return "bytes between segments"
    return ""


def _orientation(picture: Any) -> int:
    """Return EXIF's orientation, 1 for none; 0 where the EXIF cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if raw := picture.info.get("exif"):  # read anew, since Pillow warns once
                require("PIL.Image").Exif().load(raw)
            return exif_orientation(picture)
    except Exception:  # damaged EXIF, of which Pillow raises or warns in a dozen ways
        return 0


def _gpu_change(picture: Any, change: str, short_side: int) -> str:
    """Return why a picture is not what a hardware decoder takes best; empty: it is."""
    if change:
        return change
    if min(picture.size) > short_side:
        return "scaled"
    jpeg = require("PIL.JpegImagePlugin")
    is_baseline = picture.format == "JPEG" and "progressive" not in picture.info
    if not is_baseline or picture.mode != "RGB" or jpeg.get_sampling(picture) != 2:
        return "baseline 4:2:0"
    return ""


def _plain(picture: Any, name: str) -> Any:
    """Return an upright picture of mode L or RGB."""
    image = require("PIL.Image")
    if picture.mode in _GRAY_DEPTHS or (picture.mode == "I" and name in ("PNG", "PPM")):
        upper = (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        plain = image.fromarray(upper)
    elif picture.mode in ("I", "F"):
        raise Refused(
            "32 bits a pixel, of which nothing says what is white", "convert it to 8 or 16 bits"
        )
    elif "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        colours = picture.convert("RGBA")
        plain = image.new("RGBA", colours.size, "white")
        plain.alpha_composite(colours)
        plain = plain.convert("RGB")
    else:
        plain = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    return turned(plain, _orientation(picture))


def _encode(picture: Any, lossy: bool, change: str, short_side: int | None) -> Stored:
    content, given = io.BytesIO(), (picture.height, picture.width)
    if short_side is not None:
        width, height = picture.size
        if min(width, height) > short_side:
            scale = short_side / min(width, height)
            size = (max(round(width * scale), short_side), max(round(height * scale), short_side))
            picture = picture.resize(size, require("PIL.Image").Resampling.BICUBIC)
        picture = picture.convert("RGB")
        lossy, options = True, {"quality": GPU_QUALITY, "subsampling": "4:2:0"}
    else:
        options = {"quality": LOSSY_QUALITY, "subsampling": "4:4:4"} if lossy else {}
    width, height = picture.size
    if lossy and max(width, height) > LONGEST_SIDE:
        raise Refused(
            f"expected sides of at most {LONGEST_SIDE} for a JPEG, got {height} x {width}", "cut it"
        )
    picture.save(content, "JPEG" if lossy else "PNG", **options)
    encoded, size = content.getvalue(), (height, width)
    return Stored(encoded, "jpg" if lossy else "png", size, change, given)
