"""A Vision Transformer as a folder that timm loads by itself, with its preprocessing.

config.json        architecture, its arguments and what pictures become, as timm's models on the hub
model.safetensors  the weights by timm's names
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.durable_files import created_whole, write_atomically
from m3i_fast.export.timm import timm_arguments, to_timm
from m3i_fast.export.weight_files import WEIGHTS, write_weights
from m3i_fast.models.transformer.vit import ViT

_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_ACTIVATIONS = {"gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}  # ours, timm's names
_SERIES = {1e-6: "", 1e-5: "_clip"}  # of timm's names, by the eps of their norms
_FILTERS = {"cubic": "bicubic", "linear": "bilinear"}  # ours, timm's


def save_timm_folder(
    vit: ViT, out: Path, *, mean: Sequence[float], std: Sequence[float], interpolation: str
) -> str:
    """Write a folder for `timm.create_model("local-dir:OUT", pretrained=True)`.

    Its `forward_features` is that of `vit`, and its output the mean of the patch tokens. mean, std:
    of the pixels, as fractions of 1; interpolation: cubic or linear. After an error there is no
    folder. Returns the name of timm's architecture.

    Raises ValueError for what `to_timm` refuses, for a SwiGLU or an eps that no JSON of timm names,
    and FileExistsError where `out` is there.
    """
    _expect_named(vit.cfg)
    arguments = timm_arguments(vit.cfg) | {"global_pool": "avg"}
    if vit.cfg.mlp in _ACTIVATIONS:
        arguments["act_layer"] = _ACTIVATIONS[vit.cfg.mlp]
    name = architecture(vit.cfg)
    state = to_timm(vit).state_dict()
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": 0,
        "num_features": vit.cfg.dim,
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, vit.cfg.image_size, vit.cfg.image_size],
            "fixed_input_size": False,
            "interpolation": _FILTERS[interpolation],
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [*mean],
            "std": [*std],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    with created_whole(out) as folder:
        write_weights(folder / WEIGHTS, weights)
        write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return name


def _expect_named(cfg: ViTConfig) -> None:
    """Raise ValueError for classes of layers, which a timm config in JSON cannot name."""
    for name, expected in (("mlp", ["gelu", *_ACTIVATIONS]), ("norm_eps", [*_SERIES])):
        if (got := getattr(cfg, name)) not in expected:
            raise ValueError(
                f"vision.{name}: expected {' or '.join(map(str, expected))}, which a config of "
                f"timm can say, got {got}; use --to safetensors, or m3i_fast.export.timm.to_timm "
                "in Python"
            )


def architecture(cfg: ViTConfig) -> str:
    """Return the name of a model of timm, of the same width and patch where it has one.

    The eps of its norms is that of cfg; what else differs is among `timm_arguments`.
    """
    import timm

    series = _SERIES[cfg.norm_eps]
    name = f"vit_{_SIZES.get(cfg.dim, 'base')}_patch{cfg.patch_size}{series}_224"
    return name if timm.is_model(name) else f"vit_base_patch16{series}_224"
