"""Encoded pictures: format and size from their headers, and a full decode by Pillow."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.optional_imports import require

# Extension in a shard: Pillow's name.
FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
# SOF0 to SOF15, which hold the size; C4, C8 and CC are other segments.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
START_OF_SCAN = 0xDA
MOST_STEPS = 1 << 16  # over segments and fill bytes
_PNG_DEPTH, _PNG_KIND = 24, 25  # bytes of the header: bits a channel, and which channels
_ORIENTATION = 0x0112  # in EXIF
_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that change height and width
_XMP = {"xmp", "XML:com.adobe.xmp"}  # where Pillow keeps it
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation: Pillow's Transpose
MAX_SIDE = 1 << 24  # of a picture that views are cut of, kViewMaxPicture in cuda/views/params.h

Read = Callable[[int, int], bytes]  # (offset, count) -> the picture's bytes from there


def stored_size(read: Read) -> tuple[str, int, int]:
    """Read (Pillow's format, height, width) from the header, before orientation is applied.

    Raises ValueError where the bytes are none of PNG, JPEG and WebP.
    """
    start = read(0, 24)
    if start.startswith(PNG_START) and len(start) == 24:
        width, height = struct.unpack(">II", start[16:])
        return "PNG", height, width
    if start.startswith(b"\xff\xd8"):
        return "JPEG", *_frame_size(read)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP" and len(start) == 24:
        return "WEBP", *_webp_size(read(12, 18))
    raise ValueError(f"expected PNG, JPEG or WebP data, got {start[:8]!r}")


def _webp_size(chunk: bytes) -> tuple[int, int]:
    """Read (height, width) from the first chunk of a WebP."""
    if len(chunk) < 18:
        raise ValueError(f"expected the header of a WebP, got {len(chunk)} bytes of it")
    if chunk.startswith(b"VP8X"):
        width, height = (int.from_bytes(chunk[i : i + 3], "little") + 1 for i in (12, 15))
    elif chunk.startswith(b"VP8L"):
        bits = int.from_bytes(chunk[9:13], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(chunk[i : i + 2], "little") & 0x3FFF for i in (14, 16))
    return height, width


def _frame_size(read: Read) -> tuple[int, int]:
    """Find (height, width) in the frame header of a JPEG, segment by segment up to the pixels."""
    size = None
    place = 2
    for _ in range(MOST_STEPS):
        segment = read(place, 9)
        if len(segment) < 9:
            break
        first, marker = segment[:2]
        if first == 0xFF and marker == START_OF_SCAN and size is not None:
            return size
        # Pillow skips bytes between segments, DALI stops at them.
        if first != 0xFF or marker < 0xC0 or 0xD0 <= marker <= START_OF_SCAN:
            break
        if marker in FRAMES:
            if size is not None:
                break
            height, width = struct.unpack(">HH", segment[5:])
            size = height, width
        place += 1 if marker == 0xFF else 2 + int.from_bytes(segment[2:4], "big")
    raise ValueError("expected JPEG segments with one frame header before the pixels, got others")


def check_header(read: Read, extension: str | None, max_pixels: int) -> tuple[str, int, int]:
    """Return (Pillow's format, height, width) of a picture, of its header.

    Raises ValueError where the header is not that of a decodable picture of this extension; None:
    of any. Reads a few bytes and allocates nothing, so that a small file of a huge picture, which
    takes a decoder gigabytes and minutes, is refused before it is decoded.
    """
    try:
        stored, height, width = stored_size(read)
    except ValueError as error:
        raise ValueError(f"corrupt or empty image: {error}") from None
    if extension is not None and stored != FORMATS[extension]:
        raise ValueError(f"expected {extension}, got {stored} data")
    if height * width == 0:
        raise ValueError(f"corrupt or empty image: {height} x {width} pixels")
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"expected sides of at most {MAX_SIDE} pixels, got {height} x {width}")
    if height * width > max_pixels:
        raise ValueError(
            f"expected at most {max_pixels} pixels, got {height} x {width} = {height * width}; "
            "raise max_pixels where pictures are meant to be so large"
        )
    return stored, height, width


def decode_pixels(image: bytes, max_pixels: int, extension: str | None = None) -> NDArray[np.uint8]:
    """Decode a picture as DALI's CPU decoder does: [height, width, 3] upright, the same bits.

    Of 16 bits a channel the nearest of 8 bits are taken. The checksums of a PNG are compared, which
    Pillow leaves unread when it decodes. Raises ValueError as `check_header`, and where the picture
    is corrupt.
    """
    stored, *_ = check_header(lambda at, count: image[at : at + count], extension, max_pixels)
    is_deep = stored == "PNG" and image[_PNG_DEPTH:_PNG_KIND] == b"\x10"  # 16 bits, if there
    try:
        if stored == "PNG":
            _reader(stored)(io.BytesIO(image)).verify()
        with _reader(stored)(io.BytesIO(image)) as opened:
            if is_deep:
                return ((_deep_pixels(opened, image) + 128) // 257).astype(np.uint8)
            return rgb_pixels(opened, has_end=stored != "JPEG" or _has_end(image))
    except Exception as error:  # Pillow raises a dozen types on corrupt data
        raise ValueError(f"corrupt or empty image: {error}") from error


def exif_orientation(picture: Any) -> int:
    """Return the orientation of a Pillow picture by its EXIF, 1 to 8.

    That of XMP, which Pillow takes where EXIF has none, is left alone: DALI reads EXIF only.
    """
    found = picture.getexif().get(_ORIENTATION, 1)
    if picture.info.keys() & _XMP:
        exif = require("PIL.Image").Exif()
        exif.load(picture.info.get("exif", b""))
        found = exif.get(_ORIENTATION, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def turned(picture: Any, orientation: int) -> Any:
    """Return a Pillow picture made upright from an orientation of EXIF's."""
    if orientation not in _TURNS:
        return picture
    return picture.transpose(require("PIL.Image").Transpose(_TURNS[orientation]))


def upright_size(image: bytes) -> tuple[int, int]:
    """Return (height, width) of a picture turned as EXIF says, whose header is whole."""
    with _reader(stored_size(lambda at, count: image[at : at + count])[0])(
        io.BytesIO(image)
    ) as opened:
        width, height = opened.size
        is_turned = exif_orientation(opened) in _ON_ITS_SIDE
    return (width, height) if is_turned else (height, width)


def rgb_pixels(picture: Any, *, has_end: bool = True) -> NDArray[np.uint8]:
    """Return the pixels of a Pillow picture, [height, width, 3] upright, as `decode_pixels`.

    has_end: whether the file has its end, which tells how DALI decodes a JPEG of CMYK.
    Of colours of 16 bits Pillow has kept the high bytes alone, which is up to one level less.
    """
    upright = turned(picture, exif_orientation(picture))
    if upright.mode.startswith("I"):  # which convert("RGB") would clip at 255
        gray = (np.asarray(upright).astype(np.uint32) + 128) // 257
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    if upright.mode == "CMYK":
        is_turned = exif_orientation(picture) > 1
        # Only a JPEG lacks the marker; a copy of one in memory is as Pillow understood it.
        has_adobe = "adobe" in picture.info or picture.format != "JPEG"
        return _from_cmyk(upright, by_opencv=is_turned or not has_end, has_adobe=has_adobe)
    return np.array(upright.convert("RGB"))


def _deep_pixels(opened: Any, image: bytes) -> NDArray[np.uint32]:
    """Decode a PNG of 16 bits a channel: [height, width, 3] in 0..65535.

    Of colours and transparency Pillow keeps the high bytes; it is told to keep the low ones too.
    """
    kind = image[_PNG_KIND]
    if kind == 0:
        gray = _upright(opened)
        return np.repeat(gray[..., None], 3, axis=2)
    if kind == 4:  # gray and transparency, of two bytes each, are read as four channels
        opened.tile = [tile._replace(args="RGBA") for tile in opened.tile]
        four = _upright(opened)
        return np.repeat(four[..., :1] << 8 | four[..., 1:2], 3, axis=2)
    high = _upright(opened)[..., :3]
    with _reader("PNG")(io.BytesIO(image)) as again:
        # As of little-endian numbers, whose high bytes stand where the low ones do here.
        again.tile = [tile._replace(args=f"{again.mode};16L") for tile in again.tile]
        low = _upright(again)[..., :3]
    return (high * 256 + low).astype(np.uint32)


def _upright(opened: Any) -> NDArray[np.uint32]:
    """Decode to an array, turned as EXIF says."""
    return np.asarray(turned(opened, exif_orientation(opened))).astype(np.uint32)


def _has_end(jpeg: bytes) -> bool:
    """Whether the marker of the end (EOI) follows the last scan; pixels cannot hold its bytes."""
    return b"\xff\xd9" in jpeg[jpeg.rfind(bytes([0xFF, START_OF_SCAN])) :]


def _from_cmyk(upright: Any, *, by_opencv: bool, has_adobe: bool) -> NDArray[np.uint8]:
    """Convert CMYK to RGB as DALI does, which is up to 2 levels from Pillow: [height, width, 3].

    DALI decodes by libjpeg-turbo what is upright, and by OpenCV what EXIF turns or what ends
    before the marker of its end. A file with Adobe's marker says how much light each ink leaves,
    one without it how much ink there is; OpenCV and Pillow take all files for Adobe's.
    """
    light = 255 - np.asarray(upright).astype(np.uint32)
    if not (has_adobe or by_opencv):
        light = 255 - light
    colours, black = light[..., :3], light[..., 3:]
    rgb = black - ((255 - colours) * black >> 8) if by_opencv else colours * black // 255
    return rgb.astype(np.uint8)


def decode(image: bytes, extension: str | None, max_pixels: int) -> tuple[int, int]:
    """Decode a whole picture; returns its upright (height, width).

    Raises ValueError as `check_header`, and where the picture is corrupt.
    """
    height, width, _ = decode_pixels(image, max_pixels, extension).shape
    return height, width


def _reader(stored: str) -> Callable[[io.BytesIO], Any]:
    """Return a format's own reader, since Image.open has another limit of pixels."""
    name = "WebP" if stored == "WEBP" else stored.capitalize()
    reader: Callable[[io.BytesIO], Any] = getattr(
        require(f"PIL.{name}ImagePlugin"), f"{name}ImageFile"
    )
    return reader
