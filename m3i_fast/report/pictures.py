"""Pictures of the page as inline PNGs, and crop boxes in pixels for SVG."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from m3i_fast.report.inputs import MixedPair, Nearest, PatchPca, Picture, RetrievalRow

SMALL = 96  # pixels; a smaller picture is enlarged without smoothing
THUMBNAIL = 128  # pixels, of a picture that is found
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Inline:
    """An <img>: data URI, alternative text, size, and whether enlarging keeps its pixels."""

    uri: str
    alt: str
    width: int
    height: int
    pixelated: bool


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels of its picture, mirrored or not."""

    x: float
    y: float
    width: float
    height: float
    mirrored: bool


@dataclass(frozen=True, slots=True)
class PairPictures:
    """The pictures that explain one mixed input."""

    originals: tuple[Inline, Inline]
    boxes_a: tuple[Box, Box]
    boxes_b: tuple[Box, Box]
    view_a: tuple[Inline, Inline]
    view_b: tuple[Inline, Inline]
    mask: Inline
    mixed: Inline
    own_cells: tuple[Inline, Inline]  # the mixed input with the other picture's cells left out


@dataclass(frozen=True, slots=True)
class RetrievedPictures:
    """The pictures that an encoder retrieves for a caption, and the rank of the right one."""

    pictures: tuple[Inline, ...]
    right: int | None
    rank: int


@dataclass(frozen=True, slots=True)
class RetrievalCard:
    """A caption, its picture, and what both encoders retrieve for it."""

    caption: str
    picture: Inline
    trained: RetrievedPictures
    untrained: RetrievedPictures | None


@dataclass(frozen=True, slots=True)
class PcaCard:
    """A picture, and its patch features as colour by both encoders."""

    name: str
    picture: Inline
    trained: Inline
    untrained: Inline | None


def inline(
    picture: npt.NDArray[np.uint8],  # [H, W], [H, W, 3] or [H, W, 4]
    alt: str,
) -> Inline:
    """Encode a picture as a lossless inline PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    height, width = picture.shape[:2]
    return Inline(uri, alt, width, height, pixelated=max(height, width) < SMALL)


def photo(picture: Picture, alt: str) -> Inline:
    """Encode a picture inline: a small one without loss, to be enlarged, others as JPEG."""
    height, width = picture.shape[:2]
    if max(height, width) < SMALL:
        return inline(picture, alt)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Inline(uri, alt, width, height, pixelated=False)


def thumbnail(picture: Picture, alt: str) -> Inline:
    """Encode a picture inline, at most THUMBNAIL pixels long."""
    if max(picture.shape[:2]) > THUMBNAIL:
        image = Image.fromarray(picture)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        picture = np.asarray(image)
    return photo(picture, alt)


def pair_pictures(pair: MixedPair) -> PairPictures:
    """Draw the pictures that explain one mixed input."""
    names = [caption or f"picture {i + 1}" for i, caption in enumerate(pair.captions)]
    first = _cells(pair)
    shown = round(100 * float(pair.mask.mean()))

    def both(pictures: tuple[Picture, Picture], what: str) -> tuple[Inline, Inline]:
        one, two = (photo(p, f"{what} {n}") for p, n in zip(pictures, names, strict=True))
        return one, two

    return PairPictures(
        originals=both(pair.originals, "Training picture:"),
        boxes_a=_boxes(pair.boxes_a),
        boxes_b=_boxes(pair.boxes_b),
        view_a=both(pair.view_a, "View a of"),
        view_b=both(pair.view_b, "View b of"),
        mask=inline(
            np.where(pair.mask, 40, 215).astype(np.uint8),
            f"Mask of {pair.mask.shape[0]} by {pair.mask.shape[1]} cells; {shown}% dark cells show "
            "picture 1, the light ones picture 2",
        ),
        mixed=photo(pair.mixed, f"Mixed input: cells of {names[0]} and of {names[1]}"),
        own_cells=(
            inline(_only(pair.mixed, first), f"The cells of the input that show {names[0]}"),
            inline(_only(pair.mixed, ~first), f"The cells of the input that show {names[1]}"),
        ),
    )


def retrieval_card(row: RetrievalRow) -> RetrievalCard:
    """Draw the pictures of a caption and of what both encoders retrieve for it."""
    return RetrievalCard(
        row.caption,
        thumbnail(row.picture, f'The picture of "{row.caption}"'),
        _retrieved(row.trained),
        None if row.untrained is None else _retrieved(row.untrained),
    )


def pca_card(item: PatchPca) -> PcaCard:
    """Draw a picture's patch features as colour, by both encoders."""

    def colours(values: npt.NDArray[np.floating[Any]], who: str) -> Inline:
        picture = (255 * values).round().astype(np.uint8)
        return inline(picture, f"Patch features of {item.name}, {who}")

    return PcaCard(
        item.name,
        photo(item.picture, item.name),
        colours(item.trained, "trained encoder"),
        None if item.untrained is None else colours(item.untrained, "untrained encoder"),
    )


def _retrieved(nearest: Nearest) -> RetrievedPictures:
    pictures = tuple(
        thumbnail(picture, f"{i + 1}: {name}" + (" (the right one)" if i == nearest.right else ""))
        for i, (picture, name) in enumerate(zip(nearest.pictures, nearest.names, strict=True))
    )
    return RetrievedPictures(pictures, nearest.right, nearest.rank)


def _boxes(boxes: npt.NDArray[np.float32]) -> tuple[Box, Box]:  # [2, 5]
    one, two = (
        Box(float(x), float(y), float(width), float(height), bool(flip))
        for y, x, height, width, flip in boxes
    )
    return one, two


def _cells(pair: MixedPair) -> npt.NDArray[np.bool_]:  # [S, S], True: shows the first picture
    height = pair.mixed.shape[0] // pair.mask.shape[0]
    width = pair.mixed.shape[1] // pair.mask.shape[1]
    return pair.mask.repeat(height, 0).repeat(width, 1)


def _only(picture: Picture, keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:  # [S, S, 4]
    alpha = np.where(keep, 255, 0).astype(np.uint8)[..., None]
    return np.concatenate([picture * (alpha > 0), alpha], axis=-1)
