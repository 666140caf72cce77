"""A run's preprocessing as the preprocessor_config.json that AutoImageProcessor reads.

Ours cuts the largest centred square and then resizes it. Most classes of transformers resize first
and cut afterwards, which gives other pixels of every picture that is no square;
PerceiverImageProcessor, whose square is size / crop_size of the shorter side, has our order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

_FILTERS = {"linear": 2, "cubic": 3}  # ours, Pillow's number


def preprocessor_config(
    size: int, *, mean: Sequence[float], std: Sequence[float], interpolation: str, has_text: bool
) -> bytes:
    """Return the content of preprocessor_config.json.

    mean, std: of the pixels, as fractions of 1; interpolation: cubic or linear; has_text: whether
    there is a tokenizer too, for AutoProcessor.
    """
    square = {"height": size, "width": size}
    config = {
        "image_processor_type": "PerceiverImageProcessor",
        "do_convert_rgb": True,
        "do_center_crop": True,
        "crop_size": square,
        "do_resize": True,
        "size": square,
        "resample": _FILTERS[interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*mean],
        "image_std": [*std],
    }
    if has_text:
        config["processor_class"] = "CLIPProcessor"
    return (json.dumps(config, indent=2) + "\n").encode()
