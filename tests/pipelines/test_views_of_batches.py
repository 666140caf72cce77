"""Crops and their boxes: read back from the pixels of a picture that shows its own coordinates."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from tests.shared.pipelines.data import Packer, encode_image, sample, smooth_picture

HEIGHT, WIDTH = 54, 72
STEP = 3  # levels a pixel, so that rounding to whole levels costs a third of a pixel at most
OFFSET = 20  # keeps JPEG's rounding clear of 0 and 255, where clipping would shift the mean
# Transpositions by which a camera's stored pixels differ from the upright picture.
UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
PLAIN = ViewConfig(size=48, scale=(0.1, 1.0), jitter_probability=0, gray_probability=0)


def coordinate_picture() -> NDArray[np.uint8]:
    """[H, W, 3] red = OFFSET + STEP x, green = OFFSET + STEP y."""
    y, x = (OFFSET + STEP * np.mgrid[0:HEIGHT, 0:WIDTH]).astype(np.uint8)
    return np.stack([x, y, np.full_like(x, 128)], axis=-1)


def coordinate_jpeg(orientation: int) -> bytes:
    picture = Image.fromarray(coordinate_picture())
    undo = UNDO[orientation]
    stored = picture if undo is None else picture.transpose(undo)
    exif = stored.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=100, subsampling=0, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    assert np.abs(np.asarray(upright).astype(int) - coordinate_picture()).max() <= 8
    return buffer.getvalue()


def read_back(view: torch.Tensor) -> list[float]:
    """(y, x, height, width, flip) of the region that a view [3, S, S] of the picture shows."""
    size = view.shape[-1]
    cells = np.arange(size) + 0.5
    inner = slice(4, -4)  # the filter is cut off at the picture's border
    coordinates = (view[:2].double().numpy() - OFFSET) / STEP + 0.5
    x_slope, x_start = np.polyfit(cells[inner], coordinates[0].mean(0)[inner], 1)
    y_slope, y_start = np.polyfit(cells[inner], coordinates[1].mean(1)[inner], 1)
    flip = x_slope < 0
    left = x_start + (x_slope * size if flip else 0.0)
    return [y_start, left, y_slope * size, abs(x_slope) * size, float(flip)]


def first_batches(path: Path, cfg: LoaderConfig, number: int) -> list[Batch]:
    loader = Loader(replace(cfg, path=path))
    return [next(loader) for _ in range(number)]


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
@pytest.mark.parametrize("flip_probability", [0.0, 0.5, 1.0])
def test_boxes_are_what_the_pixels_show(
    packer: Packer, flip_probability: float, interpolation: str
) -> None:
    files = [encode_image(coordinate_picture())] + [coordinate_jpeg(i) for i in range(1, 9)]
    path = packer([sample(i, file) for i, file in enumerate(files)])
    view = replace(PLAIN, flip_probability=flip_probability, interpolation=interpolation)
    cfg = LoaderConfig(batch_size=9, global_views=view, local_views=replace(view, size=32, count=3))
    flips = []
    for batch in first_batches(path, cfg, 6):
        assert set(batch.sample_id.tolist()) == set(range(9))
        assert batch.boxes.shape == (9, 5, 5)
        assert batch.image_size.tolist() == [[HEIGHT, WIDTH]] * 9
        for v, views in enumerate((*batch.global_views, *batch.local_views)):
            for i in range(9):
                expected = batch.boxes[i, v].tolist()
                np.testing.assert_allclose(read_back(views[i]), expected, atol=0.5)
                flips.append(expected[4])
    share = {0.0: (0, 0), 0.5: (0.35, 0.65), 1.0: (1, 1)}[flip_probability]
    assert share[0] <= np.mean(flips) <= share[1]


@pytest.mark.parametrize(
    ("interpolation", "oracle"),
    [("cubic", Image.Resampling.BICUBIC), ("linear", Image.Resampling.BILINEAR)],
)
def test_views_equal_pillows_crop_and_resize(
    packer: Packer, interpolation: str, oracle: Image.Resampling
) -> None:
    pictures = [smooth_picture(i, 90, 120) for i in range(8)]
    path = packer([sample(i, encode_image(picture)) for i, picture in enumerate(pictures)])
    view = replace(PLAIN, interpolation=interpolation)
    for batch in first_batches(path, LoaderConfig(batch_size=8, global_views=view), 4):
        for v, views in enumerate(batch.global_views):
            for i, index in enumerate(batch.sample_id.tolist()):
                y, x, height, width, flip = batch.boxes[i, v].int().tolist()
                crop = Image.fromarray(pictures[index]).crop((x, y, x + width, y + height))
                resized = crop.resize((48, 48), oracle)
                resized = ImageOps.mirror(resized) if flip else resized
                difference = np.abs(views[i].permute(1, 2, 0).numpy() - np.int16(resized))
                assert difference.mean() < 0.1 and difference.max() <= 2


def test_crops_are_distributed_as_torchvisions(packer: Packer) -> None:
    picture = encode_image(np.zeros((120, 160, 3), np.uint8))
    path = packer([sample(i, picture) for i in range(64)])
    view = ViewConfig(size=4, scale=(0.2, 0.9), ratio=(0.6, 1.8), jitter_probability=0)
    boxes = torch.cat(
        [b.boxes.flatten(0, 1) for b in first_batches(path, LoaderConfig(global_views=view), 16)]
    )
    torch.manual_seed(0)
    oracle = RandomResizedCrop(4, view.scale, view.ratio)
    theirs = torch.tensor(
        [oracle.get_params(torch.zeros(3, 120, 160), view.scale, view.ratio) for _ in range(2048)]
    )
    y, x, height, width, flip = boxes.unbind(1)
    assert (y >= 0).all() and (y + height <= 120).all()
    assert (x >= 0).all() and (x + width <= 160).all()
    area = height * width / (120 * 160)
    assert 0.19 <= area.min() < 0.25 and 0.8 < area.max() <= 0.91
    ratio = width / height
    assert 0.57 <= ratio.min() and ratio.max() <= 1.85
    assert 0.45 < flip.mean() < 0.55
    for ours, expected in (
        (area, theirs[:, 2] * theirs[:, 3] / (120 * 160)),
        (ratio, theirs[:, 3] / theirs[:, 2]),
        (y / (120 - height).clamp(min=1), theirs[:, 0] / (120 - theirs[:, 2]).clamp(min=1)),
    ):
        assert ks_2samp(ours, expected).pvalue > 1e-3


def test_views_of_one_image_differ(fifty: Path) -> None:
    view = replace(PLAIN, count=3)
    (batch,) = first_batches(fifty, LoaderConfig(batch_size=32, global_views=view), 1)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        equal = (batch.boxes[:, first, :4] == batch.boxes[:, second, :4]).all(1)
        assert equal.float().mean() < 0.1
        flips = batch.boxes[:, first, 4] == batch.boxes[:, second, 4]
        assert 0 < flips.float().mean() < 1


def test_ranges_of_one_value_fix_the_crop(packer: Packer) -> None:
    path = packer([sample(i, encode_image(smooth_picture(i, 60, 60))) for i in range(4)])
    view = replace(PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip_probability=0.0)
    (batch,) = first_batches(path, LoaderConfig(batch_size=4, global_views=view), 1)
    assert batch.boxes.tolist() == [[[0, 0, 60, 60, 0]] * 2] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is seen")
def test_gpu_views_are_close_to_the_cpus(packer: Packer) -> None:
    files = [encode_image(smooth_picture(i, 90, 120), "JPEG", quality=95) for i in range(8)]
    path = packer([sample(i, file) for i, file in enumerate(files)])
    cfg = LoaderConfig(path=path, batch_size=8, global_views=ViewConfig(size=48))
    on_cpu, on_gpu = next(Loader(cfg)), next(Loader(cfg, device_id=0)).to("cpu")
    assert torch.equal(on_cpu.boxes, on_gpu.boxes)
    assert torch.equal(on_cpu.token_ids, on_gpu.token_ids)
    for ours, theirs in zip(on_gpu.global_views, on_cpu.global_views, strict=True):
        error = (ours.float() - theirs.float()).square().mean()
        assert 10 * torch.log10(255.0**2 / error) > 35
