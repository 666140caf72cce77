"""Synthetic photograph-like JPEGs for benchmarks, in any number, generated from (seed, index).

A picture is a "dead leaves" model (occluding shapes with sizes of density r^-3: edges at every
scale; Lee, Mumford and Huang, 2001) over 1/f texture, with a smaller share of the power in chroma,
a lens blur and sensor noise. Spectrum, edges and file sizes are like those of photographs.
"""

from __future__ import annotations

import colorsys
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.pack import DatasetInfo, write_dataset
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.optional_imports import require

GROUNDS = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink")
GROUND_HUES = (0.0, 0.08, 0.16, 0.33, 0.5, 0.62, 0.76, 0.92)  # turns
SMALLEST_LEAF, LARGEST_LEAF = 4.0, 160.0  # radius in pixels
TEXTURE, CHROMA, NOISE = 15.0, 0.35, 1.5  # deviations in gray levels; chroma relative to texture


def one_over_f(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Draw [H, W] noise of mean 0 and deviation 1 whose amplitude falls as 1 / frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    shape = frequency.shape
    spectrum = (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / frequency
    texture = np.fft.irfft2(spectrum, s=(height, width))
    return (texture / texture.std()).astype(np.float32)


def _leaf_colour(rng: np.random.Generator, hue: float) -> tuple[int, int, int]:
    turned = (hue + rng.normal(0.0, 0.12)) % 1.0
    value = float(np.clip(rng.normal(0.55, 0.22), 0.05, 0.98))
    red, green, blue = colorsys.hsv_to_rgb(turned, float(rng.beta(2.0, 3.5)), value)
    return round(255 * red), round(255 * green), round(255 * blue)


def picture(
    rng: np.random.Generator, *, height: int, width: int, hue: float, num_leaves: int
) -> NDArray[np.uint8]:
    """Draw a photograph-like picture [H, W, 3] around a hue (in turns)."""
    image, draw_module = require("PIL.Image"), require("PIL.ImageDraw")
    canvas = image.new("RGB", (width, height), _leaf_colour(rng, hue))
    draw = draw_module.Draw(canvas)
    low, high = LARGEST_LEAF**-2.0, SMALLEST_LEAF**-2.0
    radii = np.sort(rng.uniform(low, high, num_leaves) ** -0.5)[::-1]  # density r^-3, large first
    for radius in radii:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        stretch = rng.uniform(0.5, 1.5)
        colour = _leaf_colour(rng, hue)
        bounds = [x - radius * stretch, y - radius, x + radius * stretch, y + radius]
        if rng.random() < 0.5:
            draw.ellipse(bounds, fill=colour)
        else:
            sides, turn = int(rng.integers(3, 7)), int(rng.integers(360))
            draw.regular_polygon((x, y, radius), sides, rotation=turn, fill=colour)
    blur = require("PIL.ImageFilter").GaussianBlur(0.6)
    pixels = np.asarray(canvas.filter(blur), dtype=np.float32)
    luminance = one_over_f(rng, height, width)
    chroma = one_over_f(rng, height, width)
    texture = TEXTURE * (
        luminance[..., None]
        + CHROMA * chroma[..., None] * np.array([1.0, -0.3, -1.0], dtype=np.float32)
    )
    grain = NOISE * rng.standard_normal((height, width, 1), dtype=np.float32)
    result: NDArray[np.uint8] = np.clip(pixels + texture + grain, 0, 255).astype(np.uint8)
    return result


class _Pictures:
    """Samples that are drawn when they are indexed."""

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        size_hw: tuple[int, int],
        quality: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.size_hw = size_hw
        self.quality = quality
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int, /) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        label = int(rng.integers(len(GROUNDS)))
        num_leaves = int(rng.integers(200, 900))
        height, width = self.size_hw
        pixels = picture(
            rng, height=height, width=width, hue=GROUND_HUES[label], num_leaves=num_leaves
        )
        buffer = io.BytesIO()
        require("PIL.Image").fromarray(pixels).save(buffer, "JPEG", quality=self.quality)
        caption = f"a picture of {num_leaves} overlapping shapes, most of them {GROUNDS[label]}"
        return Sample(
            image=buffer.getvalue(),
            extension="jpg",
            name="picture",
            sample_id=index,
            group_id=index,
            captions=(self.tokenizer.encode(caption),),
            label=label,
        )


def build(
    out: Path,
    *,
    num_samples: int = 2048,
    size_hw: tuple[int, int] = (375, 500),
    quality: int = 90,
    num_merges: int | None = None,
    context_length: int = 77,
    seed: int = 0,
    samples_per_shard: int = 256,
) -> Path:
    """Write `num_samples` baseline JPEGs (4:2:0) with captions and labels as split "train".

    size_hw: height and width in pixels. Returns `out`; raises ValueError for a number below 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    tokenizer = Tokenizer(num_merges, context_length)
    pictures = _Pictures(
        num_samples, seed=seed, size_hw=size_hw, quality=quality, tokenizer=tokenizer
    )
    settings: dict[str, Any] = {
        "num_samples": num_samples,
        "size_hw": list(size_hw),
        "quality": quality,
    }
    info = DatasetInfo(
        name="synthetic",
        class_names=GROUNDS,
        tokenizer=tokenizer.info,
        licence="Apache-2.0",
        attribution="Generated by m3i-fast.",
        settings=settings,
    )
    return write_dataset(
        out, {"train": pictures}, info, seed=seed, samples_per_shard=samples_per_shard
    )
