"""A folder that transformers loads: config, weights, preprocessing, tokenizer and card.

config.json, model.safetensors           the model, of a class of transformers where one fits
modeling_m3i.py and two more             its code, where none does (`own_model`)
preprocessor_config.json                 what a picture becomes
tokenizer.json, tokenizer_config.json    with a text encoder
README.md                                the model card
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_fast.durable_files import created_whole, write_atomically
from m3i_fast.export.weight_files import WEIGHTS, write_weights


def save_folder(
    out: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    files: Mapping[str, bytes],
) -> None:
    """Write a new folder; after an error there is none. Raises FileExistsError where it is there.

    files: the content of all others than config.json and the weights, by name.
    """
    with created_whole(out) as folder:
        write_weights(folder / WEIGHTS, weights)
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for name, content in files.items():
            write_atomically(folder / name, content)
