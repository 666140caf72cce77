"""Settings out of range are refused with field and value."""

from __future__ import annotations

from typing import Any

import pytest

from m3i_fast.config.data import LoaderConfig, ViewConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 to 65536, got 0"),
        ({"num_threads": 0}, "num_threads: expected 1 to 1024, got 0"),
        ({"seed": -1}, "seed: expected .*, got -1"),
        (
            {"exact_decode": True, "hw_decoder_load": 0.4},
            "hw_decoder_load: expected None or 0 with exact_decode, got 0.4",
        ),
        ({"hw_decoder_load": 1.5}, r"hw_decoder_load: expected a share in \[0, 1\], got 1.5"),
    ],
)
def test_loader_config_is_validated(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (0.5, 1.2)}, r"scale: expected .* got \(0.5, 1.2\)"),
        ({"scale": (0.0, 1.0)}, "scale: expected"),
        ({"scale": (0.8, 0.5)}, "scale: expected"),
        ({"ratio": (0.0, 1.0)}, "ratio: expected"),
        ({"size": 0}, "size: expected 1 to 8192, got 0"),
        ({"count": 0}, "count: expected 1 to 64, got 0"),
        ({"flip_probability": 1.5}, r"flip_probability: expected a probability .* got 1.5"),
        ({"hue": 0.7}, "hue: expected"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma: expected"),
        ({"brightness": float("nan")}, "brightness: expected a finite number, got nan"),
    ],
)
def test_view_config_is_validated(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewConfig(**fields)
