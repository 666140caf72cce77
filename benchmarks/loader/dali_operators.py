"""A loader of DALI's own operators, as a peer: every view is drawn, cut and coloured by DALI.

Each view is a dozen operators: a drawn box, a resize of that region, hue and saturation (in YIQ,
where torchvision turns hue in HSV), brightness and contrast about the view's mean gray, a blur
whose window follows its sigma, solarize by arithmetic, and a mirroring transpose to CHW. What is
not applied to a sample is computed with factors that change nothing, since a condition splits and
merges the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from m3i_fast.benchmarks.loader.work import Work
from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.optional_imports import require

require("nvidia.dali")

from nvidia.dali import fn, pipeline_def, types  # noqa: E402
from nvidia.dali import math as dali_math  # noqa: E402

Node = Any  # DALI's DataNode
GRAY_WEIGHTS = [0.299, 0.587, 0.114]
DEGREES_A_TURN = 360.0
INTERPOLATION = {"cubic": types.INTERP_CUBIC, "linear": types.INTERP_LINEAR}


def batches(work: Work) -> Iterator[list[Tensor]]:
    """Yield batches without end: views, boxes, image_size, captions, label and ids."""
    pipeline = graph(
        work,
        batch_size=work.batch_size,
        num_threads=work.num_threads,
        prefetch_queue_depth=work.prefetch,
        device_id=work.device_id,
        seed=1 + work.seed,
    )
    while True:
        yield [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]


@pipeline_def
def graph(work: Work) -> tuple[Node, ...]:
    """Build the graph: read shuffled samples, decode once, cut every view."""
    on_gpu = work.device_id is not None
    encoded, tokens, *numbers = fn.readers.webdataset(
        paths=list(map(str, work.shards)),
        ext=["jpg;jpeg;png;webp", "tok", "cls", "sid", "gid"],
        dtypes=[types.UINT8, types.INT32, *[types.INT64] * 3],
        missing_component_behavior="empty",
        random_shuffle=True,
        initial_fill=work.shuffle_buffer,
        shuffle_after_epoch=True,
    )
    size_hw = fn.peek_image_shape(encoded)[:2]
    image = fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
    )
    pairs = [random_view(image, size_hw, cfg) for cfg in work.views for _ in range(cfg.count)]
    num_tokens = tokens.shape(dtype=types.INT64)[0]
    padded = fn.slice(
        tokens, start=[0], shape=[work.context_length], axes=[0], out_of_bounds_policy="pad"
    )
    small = (fn.stack(*(box for _, box in pairs)), fn.cast(size_hw, dtype=types.FLOAT))
    return (
        *(view for view, _ in pairs),
        *(node.gpu() if on_gpu else node for node in small),
        padded,
        num_tokens,
        *(fn.reshape(node, shape=[]) for node in numbers),
    )


def random_view(image: Node, size_hw: Node, cfg: ViewConfig) -> tuple[Node, Node]:
    """Cut a random view: ([3, S, S] uint8, box [5] float32 of y, x, height, width, flip)."""
    anchor, extent = fn.random_crop_generator(
        size_hw, random_area=cfg.scale, random_aspect_ratio=cfg.ratio
    )
    flip = coin(cfg.flip_probability)
    anchor, extent = fn.cast(anchor, dtype=types.FLOAT), fn.cast(extent, dtype=types.FLOAT)
    view = fn.resize(
        image,
        size=[cfg.size, cfg.size],
        roi_start=anchor,
        roi_end=anchor + extent,
        interp_type=INTERPOLATION[cfg.interpolation],
        antialias=True,
    )
    mirrored = fn.crop_mirror_normalize(
        photometric(view, cfg),
        dtype=types.UINT8,
        output_layout="CHW",
        mirror=fn.cast(flip, dtype=types.INT32),
        mean=[0.0, 0.0, 0.0],
        std=[1.0, 1.0, 1.0],
    )
    return mirrored, fn.cat(anchor, extent, fn.reshape(flip, shape=[1]))


def photometric(view: Node, cfg: ViewConfig) -> Node:
    """Apply every change of a probability above 0; the others add no operator to the graph."""
    if cfg.jitters or cfg.gray_probability:
        view = jitter(view, cfg)
    if cfg.blur_probability:
        view = blur(view, cfg)
    if cfg.solarize_probability:
        view = solarize(view, cfg)
    return view


def coin(probability: float) -> Node:
    """Draw 1.0 with this probability, else 0.0."""
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)


def around(centre: float, strength: float, apply: Node) -> Node:
    """Draw uniformly in centre -+ strength where `apply` is 1; the centre where it is 0."""
    return centre + apply * strength * fn.random.uniform(range=(-1.0, 1.0))


def jitter(view: Node, cfg: ViewConfig) -> Node:
    """Change hue, saturation and grayscale, then brightness and contrast."""
    apply = coin(cfg.jitter_probability)
    if cfg.hue or cfg.saturation or cfg.gray_probability:
        saturation = around(1.0, cfg.saturation, apply)
        if cfg.gray_probability:
            saturation = saturation * (1.0 - coin(cfg.gray_probability))
        hue = around(0.0, cfg.hue, apply) * DEGREES_A_TURN
        view = fn.color_twist(view, hue=hue, saturation=saturation)
    if cfg.brightness or cfg.contrast:
        brightness = around(1.0, cfg.brightness, apply)
        view = brightness_contrast(view, brightness, around(1.0, cfg.contrast, apply))
    return view


def brightness_contrast(view: Node, brightness: Node, contrast: Node) -> Node:
    """Compute brightness * (contrast * x + (1 - contrast) * m) with the view's mean gray m."""
    channels = fn.reductions.mean(view, axes=[0, 1]).cpu()
    gray = fn.reductions.sum(channels * types.Constant(GRAY_WEIGHTS, dtype=types.FLOAT))
    return fn.brightness_contrast(
        view,
        contrast_center=0.0,
        contrast=contrast,
        brightness=brightness,
        brightness_shift=brightness * (1.0 - contrast) * gray / 255.0,
    )


def blur(view: Node, cfg: ViewConfig) -> Node:
    """Blur by a Gaussian of random sigma; where not applied, by a window of one pixel."""
    low, high = cfg.blur_sigma
    sigma = low + (high - low) * fn.random.uniform(range=(0.0, 1.0))
    radius = dali_math.ceil(3.0 * sigma) * coin(cfg.blur_probability)
    window = fn.cast(2.0 * radius + 1.0, dtype=types.INT32)
    return fn.gaussian_blur(view, sigma=sigma, window_size=window)


def solarize(view: Node, cfg: ViewConfig) -> Node:
    """Invert values of 128 and more; where not applied, of 256 and more."""
    threshold = fn.cast(256.0 - 128.0 * coin(cfg.solarize_probability), dtype=types.INT16)
    bright = view >= threshold
    inverted = types.Constant(255, dtype=types.UINT8) - view
    return fn.cast(bright * inverted + (bright ^ True) * view, dtype=types.UINT8)
