"""The image encoder in a folder of transformers, as weights for a ViT of ours.

config.json says what shapes do not: heads, norms' eps, activation and angles. One that is another
network is refused, with what it has that our ViT has not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.did_you_mean import nearest
from m3i_fast.durable_files import digest
from m3i_fast.export.huggingface.names import MODELS, ModelNames
from m3i_fast.export.vit_names import Renamed, take_weight
from m3i_fast.export.vit_weights import FittedWeights, described_weights, merge_prefix_positions
from m3i_fast.export.weight_files import WEIGHTS, read_weights, some, tensors_in
from m3i_fast.json_files import read_json
from m3i_fast.models.transformer.positions import ROTARY_BASE

_PICKLED = "pytorch_model.bin"
# What a config.json leaves out where it is the class's own default.
_DEFAULT_EPS = {"vit": 1e-12, "vit_mae": 1e-12, "ijepa": 1e-12, "dinov3_vit": 1e-5}
_EPS = 1e-6
_DEFAULT_ACT = {"siglip": "gelu_pytorch_tanh", "siglip_vision_model": "gelu_pytorch_tanh"}
_CLIP = ("clip", "clip_vision_model")
# Names in an encoder that are no part of what it computes for a whole picture.
_UNUSED = ("embeddings.mask_token", "embeddings.position_ids")
_ENCODER = ("embeddings.", "encoder.", "layer.", "layernorm.", "norm.", "post_layernorm.")


def read_folder(folder: Path, cfg: ViTConfig) -> tuple[FittedWeights, str]:
    """Return the weights of the image encoder in `folder` for a ViT of `cfg`, and their SHA-256.

    Of several files the digest is that of their names and digests. Nothing of the folder's code
    runs: weights are safetensors, or read with weights_only=True. Raises FileNotFoundError where
    config.json or the weights are missing, and ValueError for a model that our ViT cannot be.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a folder that save_pretrained of transformers wrote, found no "
            "config.json"
        )
    model_type, config = _vision_config(read_json(path), path)
    _expect_our_network(model_type, config)
    files = _weight_files(folder)
    state = {name: t for file in files for name, t in tensors_in(read_weights(file)).items()}
    named = _renamed(state, MODELS[model_type], model_type)
    if "pos_embed" in named.tensors:
        named.tensors["pos_embed"] = named.tensors["pos_embed"].reshape(
            1, -1, config["hidden_size"]
        )
    merge_prefix_positions(named.tensors, "dinov2")  # the table has the class token alone
    described = {
        "num_heads": config["num_attention_heads"],
        "norm_eps": float(config.get("layer_norm_eps", _DEFAULT_EPS.get(model_type, _EPS))),
    }
    return described_weights(named, described, cfg), _digest_of(files)


def _vision_config(config: Mapping[str, Any], path: Path) -> tuple[str, Mapping[str, Any]]:
    """Return the type of the image encoder and its config, of a model with text its part."""
    model_type = str(config.get("model_type", ""))
    if model_type in _CLIP:
        raise ValueError(
            f"{path}: expected an encoder that our ViT can be, got {model_type}: CLIP's has a norm "
            "before its first block (pre_layrnorm), and mostly QuickGELU, which our ViT has not"
        )
    if model_type not in MODELS:
        known = [*MODELS]
        raise ValueError(
            f"{path}: expected a model_type of {', '.join(known)}, got {model_type!r}"
            f".{nearest(model_type, known)}"
        )
    if model_type == "siglip":
        config = config.get("vision_config") or {}
    defaults = {"hidden_size": 768, "num_attention_heads": 12}
    if model_type == "dinov3_vit":
        defaults = {"hidden_size": 384, "num_attention_heads": 6}
    return model_type, {**defaults, **config}


def _expect_our_network(model_type: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError for what config.json says that our ViT has not."""
    gated = bool(config.get("use_swiglu_ffn") or config.get("use_gated_mlp"))
    act = config.get("hidden_act", _DEFAULT_ACT.get(model_type, "gelu"))
    wanted = "silu" if model_type == "dinov3_vit" and gated else "gelu"
    if act != wanted and not (gated and model_type != "dinov3_vit"):
        raise ValueError(
            f"hidden_act: expected {wanted}, the exact one, as our ViT has it, got {act}"
        )
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
    for theirs, ours in names.stem.items():
        take_weight(rest, theirs, ours, found)
    depth = 0
    while any(name.startswith(names.block_prefix.format(depth)) for name in rest):
        for theirs, ours in names.block.items():
            prefix = names.block_prefix.format(depth)
            take_weight(rest, theirs, f"blocks.{depth}.{ours}", found, prefix)
        depth += 1
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
