"""The encoders in a folder of transformers, as weights for a ViT and a text encoder of ours.

config.json says what shapes do not: heads, norms' eps, activation and angles. An image encoder that
is another network is refused, with what it has that our ViT has not; of texts CLIP's are taken.
preprocessor_config.json, where it is there, says how pixels were normalised.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_fast.config.fields import Mlp
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.did_you_mean import nearest
from m3i_fast.durable_files import digest
from m3i_fast.export.huggingface.names import ACTIVATIONS, CLIP_TEXT, MODELS, ModelNames
from m3i_fast.export.text_weights import fitted_text
from m3i_fast.export.vit_names import Renamed, take_weight
from m3i_fast.export.vit_weights import (
    FittedWeights,
    described_weights,
    fold_pixel_statistics,
    merge_prefix_positions,
)
from m3i_fast.export.weight_files import WEIGHTS, read_weights, some, tensors_in
from m3i_fast.json_files import read_json
from m3i_fast.models.transformer.positions import ROTARY_BASE

logger = logging.getLogger(__name__)

_PICKLED = "pytorch_model.bin"
_PREPROCESSING = "preprocessor_config.json"
# What a config.json leaves out where it is the class's own default.
_CLIP = ("clip", "clip_vision_model")
_DEFAULT_EPS = {
    **dict.fromkeys(("vit", "vit_mae", "ijepa"), 1e-12),
    **dict.fromkeys(("dinov3_vit", *_CLIP), 1e-5),
}
_EPS = 1e-6
_DEFAULT_ACT = {
    **dict.fromkeys(("siglip", "siglip_vision_model"), "gelu_pytorch_tanh"),
    **dict.fromkeys(_CLIP, "quick_gelu"),
}
_WITH_TEXT = ("clip", "siglip")
_TEXT = "text_"  # before the names of their text towers
_OLD_END = 2  # the end of CLIP's texts in older configs, which stands for the largest id
# Names in an encoder that are no part of what it computes for a whole picture.
_UNUSED = ("embeddings.mask_token", "embeddings.position_ids")
_ENCODER = (
    *("embeddings.", "encoder.", "layer.", "layernorm.", "norm."),
    *("pre_layrnorm.", "post_layernorm."),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderWeights:
    """Hold the weights that a folder gives."""

    image: FittedWeights
    sha256: str
    """Of the file of weights; of several that of their names and digests."""
    text: FittedWeights | None
    without_text: str
    """Why the folder's text tower was left out; empty where it has none."""


def read_folder(folder: Path, cfg: ViTConfig, text: TextConfig | None = None) -> FolderWeights:
    """Return the weights of the encoders in `folder` for a ViT of `cfg` and a text encoder.

    text: None where the run has no captions. Nothing of the folder's code runs: weights are
    safetensors, or read with weights_only=True. Raises FileNotFoundError where config.json or the
    weights are missing, and ValueError for a model that our ViT cannot be.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a folder that save_pretrained of transformers wrote, found no "
            "config.json"
        )
    whole = read_json(path)
    model_type, config = _vision_config(whole, path)
    mlp = _mlp(config, _DEFAULT_ACT.get(model_type, "gelu"), model_type)
    _expect_our_network(config)
    files = _weight_files(folder)
    state = {name: t for file in files for name, t in tensors_in(read_weights(file)).items()}
    named = _renamed(state, MODELS[model_type], model_type)
    if "pos_embed" in named.tensors:
        named.tensors["pos_embed"] = named.tensors["pos_embed"].reshape(
            1, -1, config["hidden_size"]
        )
    if "class_token" in named.tensors:
        named.tensors["class_token"] = named.tensors["class_token"].reshape(1, 1, -1)
    merge_prefix_positions(named.tensors, "dinov2")  # the table has the class token alone
    described = {
        "num_heads": config["num_attention_heads"],
        "norm_eps": float(config.get("layer_norm_eps", _DEFAULT_EPS.get(model_type, _EPS))),
        "mlp": mlp,
    }
    weights = described_weights(named, described, cfg)
    _normalise_as_ours(folder / _PREPROCESSING, weights)
    found, why = None, ""
    if model_type in _WITH_TEXT:
        weights.left_out = [name for name in weights.left_out if not name.startswith(_TEXT)]
        try:
            found = _text_weights(model_type, whole, state, text)
        except ValueError as error:
            why = str(error)
    return FolderWeights(image=weights, sha256=_digest_of(files), text=found, without_text=why)


def _normalise_as_ours(path: Path, weights: FittedWeights) -> None:
    """Embed pixels that are normalised as ours as the model did those normalised as it had them."""
    said = read_json(path) if path.is_file() else {}
    if not said.get("do_normalize", True):  # values of 0 to 1 as they are
        fold_pixel_statistics(weights, 0.0, 1.0)
    elif said.get("image_mean") is None or said.get("image_std") is None:
        logger.warning(
            "%s: expected image_mean and image_std, found none: pixels are taken as normalised by "
            "ImageNet's mean and deviation; copy the model's own file there if they were not",
            path,
        )
    else:
        fold_pixel_statistics(weights, said["image_mean"], said["image_std"])


def _vision_config(config: Mapping[str, Any], path: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the type of the image encoder and its config, of a model with text its part."""
    model_type = str(config.get("model_type", ""))
    if model_type not in MODELS:
        known = [*MODELS]
        raise ValueError(
            f"{path}: expected a model_type of {', '.join(known)}, got {model_type!r}"
            f".{nearest(model_type, known)}"
        )
    if model_type in _WITH_TEXT:
        config = config.get("vision_config") or {}
    defaults = {"hidden_size": 768, "num_attention_heads": 12}
    if model_type == "dinov3_vit":
        defaults = {"hidden_size": 384, "num_attention_heads": 6}
    return model_type, {**defaults, **config}


def _mlp(config: Mapping[str, Any], default: str, model_type: str) -> Mlp:
    """Return the kind of MLP that config.json says; ValueError for one that we have not."""
    act = config.get("hidden_act", default)
    if config.get("use_swiglu_ffn") or config.get("use_gated_mlp"):
        if model_type == "dinov3_vit" and act != "silu":  # DINOv2's has its own
            raise ValueError(f"hidden_act: expected silu with use_gated_mlp, got {act}")
        return "swiglu"
    for ours, theirs in ACTIVATIONS.items():
        if theirs == act:
            return ours
    raise ValueError(f"hidden_act: expected {' or '.join(ACTIVATIONS.values())}, got {act}")


def _expect_our_network(config: Mapping[str, Any]) -> None:
    """Raise ValueError for what config.json says that our ViT has not."""
    for name, expected in (("num_channels", 3), ("rope_theta", ROTARY_BASE)):
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}: expected {expected:g}, got {config[name]}")
    for name in ("image_size", "patch_size"):
        sides = config.get(name)
        if isinstance(sides, list) and len({*sides}) > 1:
            raise ValueError(f"{name}: expected a square, as our ViT has it, got {sides}")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights, one or those that an index names."""
    for name in (WEIGHTS, _PICKLED):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = {*read_json(index, {"weight_map": {str: str}})["weight_map"].values()}
            if wrong := sorted(name for name in names if Path(name).name != name):
                raise ValueError(f"{index}: expected names of files beside it, got {some(wrong)}")
            return [folder / name for name in sorted(names)]
    raise FileNotFoundError(f"{folder}: expected {WEIGHTS} or {_PICKLED}, found neither")


def _digest_of(files: list[Path]) -> str:
    digests = [digest(file).sha256 for file in files]
    if len(files) == 1:
        return digests[0]
    lines = [f"{sha256}  {file.name}\n" for sha256, file in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _renamed(state: Mapping[str, Tensor], names: ModelNames, model_type: str) -> Renamed:
    """Give the encoder's weights our names, in fp32; ValueError for those that have no place."""
    rest, others = _encoder_alone(state, names)
    found = Renamed(left_out=others)
    depth = _take_all(rest, names, found)
    if depth == 0 or "patch_embed.weight" not in found.tensors:
        example = names.block_prefix.format(0)
        raise ValueError(
            f"expected the names of {model_type}, such as {example}*, got "
            f"{some([*state][:5]) or 'no tensor'}"
        )
    unused = [name for name in rest if name in _UNUSED or not name.startswith(_ENCODER)]
    found.left_out += unused
    if unknown := [name for name in rest if name not in unused]:
        raise ValueError(
            f"expected an encoder that our ViT can be, got more in it: {some(unknown)}"
        )
    return found


def _take_all(rest: dict[str, Tensor], names: ModelNames, found: Renamed) -> int:
    """Move the weights that have names to `found`, and return the number of blocks."""
    for theirs, ours in names.stem.items():
        take_weight(rest, theirs, ours, found)
    depth = 0
    while any(name.startswith(names.block_prefix.format(depth)) for name in rest):
        for theirs, ours in names.block.items():
            prefix = names.block_prefix.format(depth)
            take_weight(rest, theirs, f"blocks.{depth}.{ours}", found, prefix)
        depth += 1
    return depth


def _encoder_alone(
    state: Mapping[str, Tensor], names: ModelNames
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of the encoder without a prefix, and the names of all others."""
    prefix = next((p for p in names.prefixes if any(n.startswith(p) for n in state)), "")
    rest = {
        name.removeprefix(prefix).removeprefix("model."): value.float()
        for name, value in state.items()
        if name.startswith(prefix)
    }
    return rest, [name for name in state if not name.startswith(prefix)]


def _text_weights(
    model_type: str, config: Mapping[str, Any], state: Mapping[str, Tensor], cfg: TextConfig | None
) -> FittedWeights:
    """Return the weights of CLIP's text tower; ValueError says why they are not taken."""
    if cfg is None:
        raise ValueError("the run has no captions")
    if model_type != "clip":
        raise ValueError(f"expected CLIP's, causal and read at its end, got that of {model_type}")
    tower = config.get("text_config") or {}
    found = Renamed()
    rest = {name: value.float() for name, value in state.items() if name.startswith(_TEXT)}
    if _take_all(rest, CLIP_TEXT, found) == 0 or "projection.weight" not in found.tensors:
        raise ValueError("expected text_model.* and text_projection, found them not")
    found.left_out = [*rest]
    found.tensors["pos_embed"] = found.tensors["pos_embed"][None]
    last = len(found.tensors["token_embedding.weight"]) - 1
    if (end := tower.get("eos_token_id", last)) not in (_OLD_END, last):
        raise ValueError(f"eos_token_id: expected the last id, {last}, got {end}")
    told = {
        "num_heads": tower.get("num_attention_heads", 8),
        "norm_eps": float(tower.get("layer_norm_eps", _DEFAULT_EPS["clip"])),
        "mlp": _mlp(tower, "quick_gelu", model_type),
    }
    return fitted_text(found, told, cfg)
