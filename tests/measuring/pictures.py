"""Small pictures of classes, models that others' libraries load from files, a source of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import timm
import torch
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 170, 60), "red": (200, 50, 40)}
TIMM = "test_vit"  # of timm, for tests: 6 blocks of width 64 at 160 pixels


def picture(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (48, 40)) -> Any:
    """A noisy picture of about one colour."""
    random = np.random.default_rng(seed)
    noise = random.normal(0, 60, (*size[::-1], 3))
    return Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8))


def image_folder(root: Path, *, splits: tuple[str, ...] = ("train", "val"), each: int = 6) -> Path:
    """Folders of splits with a folder of each colour; no splits: the folders of colours alone."""
    seed = 0
    for split in splits or ("",):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                picture(colour, seed := seed + 1).save(folder / f"{i}.png")
    return root


def timm_file(folder: Path, name: str = TIMM) -> Path:
    """All weights of a model of timm, drawn at random."""
    torch.manual_seed(1)
    file = folder / f"{name}.safetensors"
    safetensors.torch.save_file(timm.create_model(name).state_dict(), file)
    return file


def clip_folder(folder: Path) -> Path:
    """A folder that open_clip loads by local-dir: of a small model, drawn at random."""
    torch.manual_seed(2)
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 5,
            "width": 32,
            "patch_size": 8,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    folder.mkdir()
    mean = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    content = {"model_cfg": config, "preprocess_cfg": mean}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model = open_clip.CLIP(**config)
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
