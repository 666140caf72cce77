"""Photometric ops against torchvision, and coins that leave views alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage import data as photographs
from torchvision.transforms import functional as tv

from m3i_fast.config.data import ViewConfig
from m3i_fast.pipelines.graph import colour_jitter as colour
from m3i_fast.pipelines.graph.dali import DataNode, fn, pipeline_def, types

NUM_VIEWS = 64
OFF = ViewConfig(jitter_probability=0.0, gray_probability=0.0)


def photograph() -> NDArray[np.uint8]:
    """[96, 128, 3] uint8, darker than middle gray on average."""
    rocket = Image.fromarray(photographs.rocket()).resize((128, 96), Image.Resampling.BICUBIC)
    return np.asarray(rocket)


def apply(change: Callable[[DataNode], DataNode], num: int = 1) -> torch.Tensor:
    """[num, 3, 96, 128] int16: the photograph through the change, once a slot."""
    pictures = [photograph()] * num

    @pipeline_def(batch_size=num, num_threads=1, device_id=None, seed=3)
    def graph():  # type: ignore[no-untyped-def]
        return change(fn.external_source(source=lambda: pictures, layout="HWC"))

    changed = torch.from_dlpack(graph().run()[0].as_tensor())
    assert changed.dtype == torch.uint8
    return changed.permute(0, 3, 1, 2).short()


def original() -> torch.Tensor:
    return torch.from_numpy(photograph().copy()).permute(2, 0, 1)


def number(value: float) -> DataNode:
    return types.Constant(value, dtype=types.FLOAT, device="cpu", shape=[])


@pytest.mark.parametrize("brightness", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("contrast", [0.6, 1.0, 1.4])
def test_brightness_and_contrast_are_torchvisions(brightness: float, contrast: float) -> None:
    ours = apply(lambda v: colour.brightness_contrast(v, number(brightness), number(contrast)))[0]
    # In floats, so that torchvision's rounding between its two ops is not ours to follow.
    expected = tv.adjust_contrast(original().float() / 255, contrast) * brightness
    expected = (255 * expected).clamp(0, 255)
    # Contrast above 1 is clipped by torchvision before brightness dims it again.
    clipped = (255 * tv.adjust_contrast(original().float() / 255, contrast) >= 254.5).any(0)
    difference = (ours - expected).abs()[:, ~clipped]
    assert difference.max() <= 1.0 and difference.mean() < 0.5


@pytest.mark.parametrize("saturation", [0.0, 0.6, 1.4])
def test_saturation_is_torchvisions(saturation: float) -> None:
    ours = apply(lambda v: colour.hue_saturation(v, number(0.0), number(saturation)))[0]
    expected = 255 * tv.adjust_saturation(original().float() / 255, saturation)
    assert (ours - expected).abs().max() <= 1.25  # DALI's YIQ matrices are rounded


def test_grayscale_is_torchvisions() -> None:
    only_gray = replace(OFF, gray_probability=1.0)
    ours = apply(lambda v: colour.photometric(v, only_gray))[0]
    expected = 255 * tv.rgb_to_grayscale(original().float() / 255, 3)
    assert (ours - expected).abs().max() <= 1.25
    # With jitter on, too, no colour is left.
    ours = apply(lambda v: colour.photometric(v, ViewConfig(gray_probability=1.0)))
    assert (ours.amax(1) - ours.amin(1)).max() <= 3


@pytest.mark.parametrize("hue", [-0.1, -0.05, 0.05, 0.1])
def test_hue_turns_as_torchvisions_within_the_known_difference(hue: float) -> None:
    """YIQ against HSV: the turn differs by up to half of itself, hue by hue, never in the mean."""
    pixels = np.zeros((96, 128, 3), np.uint8)
    hsv = np.stack(np.broadcast_arrays(np.arange(128) * 2, 96, np.full((96, 1), 160)), -1)
    pixels[:] = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph():  # type: ignore[no-untyped-def]
        view = fn.external_source(source=lambda: [pixels], layout="HWC")
        return colour.hue_saturation(view, number(hue), number(1.0))

    ours = np.asarray(graph().run()[0].as_tensor())[0]
    theirs = tv.adjust_hue(torch.from_numpy(pixels).permute(2, 0, 1), hue).permute(1, 2, 0).numpy()
    turned = [
        (hues(changed) - hues(pixels) + 128) % 256 - 128 for changed in (ours, theirs)
    ]  # 256 levels a turn
    assert np.abs(turned[1] / 256 - hue).max() < 0.02
    assert np.abs(turned[0] / 256 - hue).max() < 0.5 * abs(hue) + 0.01  # two levels of 256
    assert np.abs(turned[0].mean() / 256 - hue) < 0.01


def hues(pixels: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.asarray(Image.fromarray(pixels).convert("HSV"))[..., 0].astype(np.int16)


def test_solarize_is_torchvisions() -> None:
    cfg = replace(OFF, solarize_probability=1.0)
    ours = apply(lambda v: colour.photometric(v, cfg))[0]
    assert torch.equal(ours, tv.solarize(original(), 128).short())


def test_blur_is_a_gaussian_of_that_sigma() -> None:
    cfg = replace(OFF, blur_probability=1.0, blur_sigma=(1.5, 1.5))
    ours = apply(lambda v: colour.photometric(v, cfg))[0]
    expected = tv.gaussian_blur(original(), [11, 11], [1.5, 1.5]).short()
    assert (ours - expected).abs().max() <= 1
    pillow = np.asarray(Image.fromarray(photograph()).filter(ImageFilter.GaussianBlur(1.5)))
    assert (ours - torch.from_numpy(pillow.copy()).permute(2, 0, 1)).abs().float().mean() < 1


@pytest.mark.parametrize(
    "probability",
    ["jitter_probability", "gray_probability", "blur_probability", "solarize_probability"],
)
def test_a_coin_that_falls_the_other_way_changes_nothing(probability: str) -> None:
    cfg = replace(OFF, blur_sigma=(1.0, 2.0), **{probability: 0.5})  # type: ignore[arg-type]
    changed = apply(lambda v: colour.photometric(v, cfg), NUM_VIEWS) - original().short()
    untouched = (changed.abs().amax((1, 2, 3)) == 0).float().mean()
    assert 0.3 < untouched < 0.7
    touched = changed.abs().amax((1, 2, 3))[changed.abs().amax((1, 2, 3)) > 0]
    assert touched.float().mean() > 5


def test_jitter_stays_within_its_strengths() -> None:
    cfg = ViewConfig(
        jitter_probability=1.0,
        gray_probability=0.0,
        brightness=0.3,
        contrast=0,
        saturation=0,
        hue=0,
    )
    ours = apply(lambda v: colour.photometric(v, cfg), NUM_VIEWS).float()
    inner = (original() > 40) & (original() < 180)
    factors = (ours / original().clamp(min=1)).masked_select(inner).reshape(NUM_VIEWS, -1).mean(1)
    assert factors.min() > 0.69 and factors.max() < 1.31
    assert factors.std() > 0.3 / 3**0.5 * 0.75
    assert 0.93 < factors.mean() < 1.07


def test_without_probabilities_the_view_passes_untouched() -> None:
    assert torch.equal(apply(lambda v: colour.photometric(v, OFF))[0], original().short())
