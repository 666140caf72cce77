"""Photometric changes of one view, without branches: random coins multiply the parameters.

Views are [H, W, 3] uint8 ("HWC") on either device; parameters are drawn on the CPU. No op gets a
seed of its own, since two ops with one seed would draw the same numbers.
"""

from __future__ import annotations

from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.graph.dali import DataNode, dali_math, fn, types

DEGREES_A_TURN = 360.0
GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision


def coin(probability: float) -> DataNode:
    """Draw 1.0 with `probability`, else 0.0."""
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)


def around(centre: float, strength: float, apply: DataNode) -> DataNode:
    """Draw uniformly in centre -+ strength where `apply` is 1; the centre where it is 0."""
    return centre + apply * strength * fn.random.uniform(range=(-1.0, 1.0))


def jitter(view: DataNode, cfg: ViewConfig) -> DataNode:
    """Change hue, saturation and grayscale, then brightness and contrast.

    These are torchvision's ColorJitter and RandomGrayscale in a fixed order: all but hue commute up
    to rounding and clipping.
    """
    apply = coin(cfg.jitter_probability)
    if cfg.hue or cfg.saturation or cfg.gray_probability:
        saturation = around(1.0, cfg.saturation, apply)
        if cfg.gray_probability:
            saturation = saturation * (1.0 - coin(cfg.gray_probability))
        view = hue_saturation(view, around(0.0, cfg.hue, apply), saturation)
    if cfg.brightness or cfg.contrast:
        brightness = around(1.0, cfg.brightness, apply)
        contrast = around(1.0, cfg.contrast, apply)
        view = brightness_contrast(view, brightness, contrast)
    return view


def hue_saturation(view: DataNode, hue: DataNode, saturation: DataNode) -> DataNode:
    """Rotate the hue by `hue` turns in YIQ (torchvision: in HSV), scale saturation about gray."""
    return fn.color_twist(view, hue=hue * DEGREES_A_TURN, saturation=saturation)


def brightness_contrast(view: DataNode, brightness: DataNode, contrast: DataNode) -> DataNode:
    """Compute brightness * (contrast * x + (1 - contrast) * m) with the view's mean gray m.

    DALI's own contrast is about a constant.
    """
    channels = fn.reductions.mean(view, axes=[0, 1]).cpu()
    gray = fn.reductions.sum(channels * types.Constant(GRAY_WEIGHTS, dtype=types.FLOAT))
    shift = brightness * (1.0 - contrast) * gray / 255.0
    return fn.brightness_contrast(
        view,
        contrast_center=0.0,
        contrast=contrast,
        brightness=brightness,
        brightness_shift=shift,
    )


def blur(view: DataNode, cfg: ViewConfig) -> DataNode:
    """Blur by a Gaussian of random sigma; where not applied, by a window of one pixel."""
    low, high = cfg.blur_sigma
    sigma = low + (high - low) * fn.random.uniform(range=(0.0, 1.0))
    radius = dali_math.ceil(3.0 * sigma) * coin(cfg.blur_probability)
    window = fn.cast(2.0 * radius + 1.0, dtype=types.INT32)
    return fn.gaussian_blur(view, sigma=sigma, window_size=window)


def solarize(view: DataNode, cfg: ViewConfig) -> DataNode:
    """Invert values of 128 and more; where not applied, of 256 and more."""
    threshold = fn.cast(256.0 - 128.0 * coin(cfg.solarize_probability), dtype=types.INT16)
    bright = view >= threshold
    inverted = types.Constant(255, dtype=types.UINT8) - view
    return fn.cast(bright * inverted + (bright ^ True) * view, dtype=types.UINT8)


def photometric(view: DataNode, cfg: ViewConfig) -> DataNode:
    """Apply every change of a probability above 0; the others add no op to the graph."""
    if cfg.jitters or cfg.gray_probability:
        view = jitter(view, cfg)
    if cfg.blur_probability:
        view = blur(view, cfg)
    if cfg.solarize_probability:
        view = solarize(view, cfg)
    return view
