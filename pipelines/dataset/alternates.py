"""Alternates, other pictures of the thing that a sample shows: how they are stored and checked.

Every sample of a split has some, or none has. A training step cuts its second view out of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from m3i_fast.pipelines.dataset.pictures import Read, check_header

# Components of a sample in a shard: the encoded pictures joined; the size of each in bytes, int32.
PICTURES, SIZES = "alt", "aln"


def components(pictures: Sequence[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield (extension, content) of a sample's other pictures; nothing where there are none."""
    if pictures:
        yield PICTURES, b"".join(pictures)
        yield SIZES, np.array([len(picture) for picture in pictures], dtype="<i4").tobytes()


def count(num_bytes: Mapping[str, int]) -> int:
    """Count the other pictures of a sample by the sizes of its components."""
    return num_bytes.get(SIZES, 0) // 4


def places(stored: bytes, num_bytes: int) -> list[tuple[int, int]]:
    """Find (start, size) of each of the pictures, which take `num_bytes` together.

    stored: the component of their sizes. Raises ValueError where it does not add up to `num_bytes`:
    a reader would cut out something else than a picture.
    """
    sizes = np.frombuffer(stored, "<i4") if len(stored) % 4 == 0 else np.zeros(1, "<i4")
    if len(sizes) == 0 or sizes.min() < 1 or int(sizes.sum(dtype=np.int64)) != num_bytes:
        raise ValueError(
            f"expected int32 sizes of at least 1 that add up to {num_bytes} bytes of {PICTURES}, "
            f"got {sizes.tolist() if len(stored) % 4 == 0 else f'{len(stored)} bytes'}"
        )
    ends = np.cumsum(sizes)
    return [(int(end - size), int(size)) for end, size in zip(ends, sizes, strict=True)]


def split(stored: bytes, sizes: bytes) -> list[bytes]:
    """Split the joined pictures of a sample; raises as `places`."""
    return [stored[start : start + size] for start, size in places(sizes, len(stored))]


def check_stored(key: str, files: Mapping[str, bytes], *, most: int, max_pixels: int) -> None:
    """Check the headers of a sample's other pictures, and that it has as many as its split says.

    files: content by extension, those of `PICTURES` and `SIZES` at least. most: the split's
    `max_alternates`. Raises ValueError, which names the component, expected and got.
    """
    if (PICTURES in files) != (SIZES in files):
        raise ValueError(f"{key}: expected {PICTURES} and {SIZES} or neither")
    number = count({name: len(content) for name, content in files.items()})
    if PICTURES in files:
        try:
            for picture in split(files[PICTURES], files[SIZES]):
                check_header(_reader(picture), None, max_pixels)
        except ValueError as error:
            raise ValueError(f"{key}.{PICTURES}: {error}") from error
    least = min(most, 1)
    if not least <= number <= most:
        raise ValueError(
            f"{key}: expected {least} to {most} other pictures a sample (manifest), got {number} "
            "of one"
        )


def _reader(content: bytes) -> Read:
    return lambda offset, count: content[offset : offset + count]
