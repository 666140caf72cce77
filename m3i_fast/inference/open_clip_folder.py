"""A model with both towers as a folder that open_clip loads by itself.

open_clip_config.json        both towers, and what pictures become
open_clip_model.safetensors  the weights by open_clip's names
tokenizer.json               the tokenizer, where it has not all of CLIP's merges
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m3i_fast.durable_files import created_whole, write_atomically
from m3i_fast.export.open_clip import to_open_clip
from m3i_fast.export.open_clip_weights import CONFIG, WEIGHTS
from m3i_fast.export.weight_files import write_weights
from m3i_fast.inference.model import Model
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.pipelines.dataset.annotations.tokenizer_json import tokenizer_files

_FILTERS = {"cubic": "bicubic", "linear": "bilinear"}  # ours, open_clip's


def save_open_clip_folder(model: Model, out: Path) -> str:
    """Write a folder for `open_clip.create_model_and_transforms("local-dir:OUT")`.

    Its encode_image, encode_text, logit_scale and logit_bias are those of `model`, its
    `get_tokenizer` has the context length and the vocabulary. After an error there is no folder.
    Returns the name of the image tower.

    Raises ValueError for a model without captions, for an InternImage and for what `to_open_clip`
    refuses, and FileExistsError where `out` is there.
    """
    caption = model.caption
    if caption is None:
        raise ValueError(
            "--to open_clip: expected a run with a caption term, whose texts its text tower "
            "embeds, got none; use --to timm or --to safetensors"
        )
    if not isinstance(model.encoder, ViT):
        raise ValueError(
            f"--to open_clip: expected a run with a ViT, got {type(model.encoder).__name__}; use "
            "--to safetensors or --to internimage"
        )
    made = to_open_clip(
        model.encoder,
        caption.head.state_dict(),
        caption.text_encoder,
        log_scale=caption.log_scale,
        bias=caption.bias,
    )
    files: dict[str, dict[str, Any]] = {}
    text = made.config["text_cfg"]
    if model.tokenizer.num_merges is not None:
        files |= tokenizer_files(model.tokenizer)
        # Read from the folder, whatever its name; the cleaning is that of SimpleTokenizer.
        text |= {"hf_tokenizer_name": out.name, "tokenizer_kwargs": {"clean": "lower"}}
    pixels = model.transform.preprocessing
    files[CONFIG] = {
        "model_cfg": made.config,
        "preprocess_cfg": {
            "size": pixels.size,
            "mode": "RGB",
            "mean": [*pixels.mean],
            "std": [*pixels.std],
            "interpolation": _FILTERS[pixels.interpolation],
            "resize_mode": "shortest",
        },
    }
    with created_whole(out) as folder:
        write_weights(folder / WEIGHTS[0], made.weights)
        for name, content in files.items():
            write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())
    return made.image_tower
