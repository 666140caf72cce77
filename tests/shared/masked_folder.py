"""A small folder of pictures with masks of class indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def masked_folder(root: Path) -> Path:
    """Pictures of two colours with masks, as ADE20k; 3 is in the training part alone."""
    for split, num in (("training", 5), ("validation", 2)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in range(num):
            mask = np.full((60, 70 + i), 1, np.uint8)
            mask[10:40, 5 + i : 50] = 2
            mask[:3] = 0
            if split == "training":
                mask[-2:] = 3
            values = np.array([[0] * 3, [30, 200, 40], [220, 30, 60], [0, 0, 255]], np.uint8)
            Image.fromarray(values[mask]).save(root / "images" / split / f"{i}.png")
            Image.fromarray(mask).save(root / "annotations" / split / f"{i}.png")
    return root
