"""What comes out of the decoders is what Pillow decodes, and the ordered pass for evaluation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.io import decode_image

from m3i_fast.config.data import BackendName
from m3i_fast.pipelines.loader import evaluation_batches
from tests.pipelines.deep_png import deep_png
from tests.shared.pipelines.data import Packer, encode_image, sample, smooth_picture

SIDE = 75
PICTURE = smooth_picture(1, SIDE, SIDE)
# Values of all sizes, with their roundings up and down.
DEEP = (np.arange(SIDE * SIDE) * 11 % 2**16).astype(np.uint16).reshape(SIDE, SIDE)
PNG_MODES = {
    "png": "RGB",
    "png gray": "L",
    "png palette": "P",
    "png alpha": "RGBA",
    "png gray alpha": "LA",
    "png 1 bit": "1",
}


def encoded(kind: str) -> bytes:
    picture = Image.fromarray(PICTURE)
    buffer = io.BytesIO()
    if kind.startswith("orientation") and kind[-1].isdecimal():
        exif = picture.getexif()
        exif[0x0112] = int(kind[-1])
        picture.save(buffer, "JPEG", quality=90, exif=exif)
    elif kind == "orientation of XMP":  # which Pillow follows where EXIF says none
        xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
        picture.save(buffer, "JPEG", quality=90, xmp=xmp)
    elif kind == "progressive":
        picture.save(buffer, "JPEG", quality=90, progressive=True)
    elif kind == "4:4:4":
        picture.save(buffer, "JPEG", quality=100, subsampling=0)
    elif kind == "gray":
        picture.convert("L").save(buffer, "JPEG")
    elif kind == "cmyk":
        picture.convert("CMYK").save(buffer, "JPEG")
    elif kind == "baseline":
        picture.save(buffer, "JPEG", quality=90)
    elif kind == "png 16 bits":
        Image.fromarray(DEEP).save(buffer, "PNG")
    else:
        mode = PNG_MODES[kind]
        picture.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


KINDS = (
    "baseline",
    "progressive",
    "4:4:4",
    "gray",
    "cmyk",
    *(f"orientation {i}" for i in range(1, 9)),
    "orientation of XMP",
    *PNG_MODES,
    "png 16 bits",
)


def decoded(kind: str) -> NDArray[np.uint8]:
    if kind == "png 16 bits":  # Pillow clips them
        gray = np.rint(DEEP / 65535 * 255).astype(np.uint8)
        return np.stack([gray] * 3, axis=2)
    opened = Image.open(io.BytesIO(encoded(kind)))
    if kind == "orientation of XMP":  # DALI reads EXIF alone
        assert opened.getexif()[0x0112] == 6
        return np.asarray(opened.convert("RGB"))
    return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_decoding_equals_pillow(packer: Packer, backend: BackendName) -> None:
    """The centre square of a square, at its own size, is the decoded picture itself."""
    path = packer([sample(i, encoded(kind)) for i, kind in enumerate(KINDS)])
    (batch,) = evaluation_batches(
        path, "train", image_size=SIDE, batch_size=len(KINDS), backend=backend
    )
    for view, size, index in zip(
        batch.global_views[0], batch.image_size, batch.sample_id.tolist(), strict=True
    ):
        expected = decoded(KINDS[index])
        assert np.array_equal(view.permute(1, 2, 0), expected), KINDS[index]
        assert tuple(size.tolist()) == expected.shape[:2], KINDS[index]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_16_bits_are_rounded_to_8(packer: Packer, backend: BackendName) -> None:
    """All values of each channel, turned as EXIF says; transparency is left out."""
    values = np.arange(2**16, dtype=np.uint16)
    deep = np.stack([values, values * 3 + 7, values[::-1], values * 5 + 1], axis=1)
    deep = deep.reshape(256, 256, 4)
    pictures = [deep[..., channels] for channels in ([0], [1, 3], [0, 1, 2], [0, 1, 2, 3])]
    stored = [deep_png(picture, orientation=3) for picture in pictures]
    for png, picture in zip(stored, pictures, strict=True):
        read = decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8))
        assert read.dtype == torch.uint16
        assert np.array_equal(read.permute(1, 2, 0).numpy(), picture)
    path = packer([sample(i, png) for i, png in enumerate(stored)])
    (batch,) = evaluation_batches(path, "train", image_size=256, batch_size=4, backend=backend)
    for view, index in zip(batch.global_views[0], batch.sample_id.tolist(), strict=True):
        colours = np.broadcast_to(pictures[index][..., : 3 if index > 1 else 1], (256, 256, 3))
        expected = np.rint(colours[::-1, ::-1] / 65535 * 255).astype(np.uint8)
        assert np.array_equal(view.permute(1, 2, 0), expected), index


def cmyk_jpeg(orientation: int, adobe: int | None) -> bytes:
    """Encode a JPEG of four colours. adobe: the transform in its marker; None: without marker."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    inks = np.concatenate([PICTURE, smooth_picture(2, SIDE, SIDE)[..., :1]], axis=2)
    buffer = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(buffer, "JPEG", quality=95, exif=exif)
    content = buffer.getvalue()
    at = content.index(b"\xff\xee\x00\x0eAdobe")
    marker = content[at : at + 16]
    kept = b"" if adobe is None else marker[:-1] + bytes([adobe])
    return content.replace(marker, kept, 1)


def test_cmyk_is_alike_on_both_backends_however_it_is_turned(packer: Packer) -> None:
    """And at most 2 levels from Pillow.

    Numbers without Adobe's marker are inks. Pillow takes them for light, and so does OpenCV, by
    which DALI decodes what EXIF turns and what has no marker at its end.
    """
    end, no_end = b"\xff\xd9", bytes(64)
    kinds = [(turn, adobe, end) for turn in range(1, 9) for adobe in (0, 2, None)]
    kinds += [(turn, adobe, no_end) for turn in (1, 6) for adobe in (0, 2, None)]
    contents = [cmyk_jpeg(turn, adobe)[:-2] + last for turn, adobe, last in kinds]
    path = packer([sample(i, content) for i, content in enumerate(contents)])
    ours, theirs = (
        next(evaluation_batches(path, "train", image_size=SIDE, batch_size=30, backend=backend))
        for backend in ("torch", "dali")
    )
    for view, other, index in zip(
        ours.global_views[0], theirs.global_views[0], ours.sample_id.tolist(), strict=True
    ):
        turn, adobe, last = kinds[index]
        by_turbo = turn == 1 and last == end
        assert torch.equal(view, other), kinds[index]
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(contents[index])))
        if by_turbo and adobe is None:
            upright = Image.fromarray(255 - np.asarray(upright), "CMYK")
        apart = np.asarray(upright.convert("RGB")).astype(np.int16)
        apart -= view.permute(1, 2, 0).numpy()
        assert np.abs(apart).max() == (1 if by_turbo else 2), kinds[index]


def test_captions_labels_and_ids_arrive(fifty: Path) -> None:
    rows = 0
    for batch in evaluation_batches(fifty, "train", image_size=8, batch_size=16):
        for i, index in enumerate(batch.sample_id.tolist()):
            num_tokens = 0 if index % 5 == 0 else 3 + index % 5
            assert batch.num_tokens[i] == num_tokens
            expected = list(range(1, 1 + num_tokens)) + [0] * (12 - num_tokens)
            assert batch.token_ids[i].tolist() == expected
            assert batch.label[i] == (-1 if index % 7 == 0 else index % 3)
            assert batch.group_id[i] == index
            assert batch.image_size[i].tolist() == [40.0, 56.0]
            rows += 1
    assert rows == 50


def test_evaluation_is_resize_shorter_and_centre_crop(packer: Packer) -> None:
    shapes = [(40, 56), (64, 33), (50, 50)]
    pictures = [smooth_picture(i, *shape) for i, shape in enumerate(shapes)]
    path = packer([sample(i, encode_image(picture)) for i, picture in enumerate(pictures)])
    (batch,) = evaluation_batches(path, "train", image_size=20, batch_size=8)
    assert batch.batch_size == 3 and not batch.local_views
    for view, box, index in zip(batch.global_views[0], batch.boxes, batch.sample_id, strict=True):
        height, width = shapes[index]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        assert box.tolist() == [[top, left, side, side, 0]]
        square = Image.fromarray(pictures[index]).crop((left, top, left + side, top + side))
        expected = np.asarray(square.resize((20, 20), Image.Resampling.BICUBIC), dtype=np.int16)
        difference = np.abs(view.permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 1


def test_evaluation_gives_every_sample_once_in_order(fifty: Path) -> None:
    passes = []
    for batch_size in (7, 50, 64):
        batches = list(evaluation_batches(fifty, "train", image_size=8, batch_size=batch_size))
        assert [b.batch_size for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        passes.append([i for b in batches for i in b.sample_id.tolist()])
    assert passes[0] == passes[1] == passes[2] and sorted(passes[0]) == list(range(50))


def test_evaluation_can_keep_one_sample_a_group(packer: Packer) -> None:
    image = encode_image(smooth_picture(0, 9, 9))
    path = packer([sample(i, image, group_id=i - i % 3) for i in range(12)])
    batches = evaluation_batches(
        path, "train", image_size=8, batch_size=5, representatives_only=True
    )
    assert sorted(i for b in batches for i in b.sample_id.tolist()) == [0, 3, 6, 9]


@pytest.mark.parametrize(("field", "value"), [("image_size", 0), ("batch_size", 0)])
def test_evaluation_settings_are_checked_at_once(fifty: Path, field: str, value: int) -> None:
    settings = {"image_size": 8, "batch_size": 8, field: value}
    with pytest.raises(ValueError, match=f"{field}: expected at least 1, got 0"):
        evaluation_batches(fifty, "train", **settings)
