"""A PNG of 16 bits a channel, which Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def deep_png(pixels: NDArray[np.uint16], orientation: int = 1) -> bytes:  # [H, W, 1 to 4]
    """Encode a PNG of 16 bits a channel, with the five filters of rows in turn."""
    height, width, channels = pixels.shape
    step = 2 * channels
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8).astype(np.int64)
    left = np.pad(rows, ((0, 0), (step, 0)))[:, :-step]
    above = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(above, ((0, 0), (step, 0)))[:, :-step]
    near = [np.abs(left + above - corner - x) for x in (left, above, corner)]
    nearest = np.choose(np.argmin(near, axis=0), [left, above, corner])
    guesses = [np.zeros_like(rows), left, above, (left + above) // 2, nearest]
    content = b"".join(
        bytes([y % 5]) + (rows[y] - guesses[y % 5][y]).astype(np.uint8).tobytes()
        for y in range(height)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0),
        b"eXIf": exif.tobytes()[6:],
        b"IDAT": zlib.compress(content),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
