"""Torchvision's transforms of a view, as the peer that benchmarks measure ours beside."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from m3i_fast.config.data import ViewConfig


def colour_transforms(cfg: ViewConfig) -> list[Any]:
    """Return torchvision v2's changes of colour and its blur in our order, those that can act."""
    v2 = import_module("torchvision.transforms.v2")
    changes: list[Any] = []
    if cfg.jitters:
        jitter = v2.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
        changes.append(v2.RandomApply([jitter], cfg.jitter_probability))
    if cfg.gray_probability:
        changes.append(v2.RandomGrayscale(cfg.gray_probability))
    if cfg.blur_probability:
        blur = v2.GaussianBlur(cfg.blur_kernel, cfg.blur_sigma)
        changes.append(v2.RandomApply([blur], cfg.blur_probability))
    if cfg.solarize_probability:
        changes.append(v2.RandomSolarize(128, cfg.solarize_probability))
    return changes
