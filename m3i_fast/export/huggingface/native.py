"""A Vision Transformer as a class of transformers with equal features, where one fits exactly.

No prefix, absolute positions, any GELU      IJepaModel
a prefix, absolute positions                 Dinov2WithRegistersModel
a prefix, rotary positions                   DINOv3ViTModel

The first token of the prefix is the class's CLS token and the others its registers, whether ours is
a class token or the first register: neither has a position. What a class has no option for is
written otherwise, exactly: LayerScale is multiplied into the layer before it, a bias without that
of keys gets zeros, and an MLP of a width that the class cannot have is padded with units of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.huggingface.names import ACTIVATIONS, MODELS
from m3i_fast.export.vit_names import ZEROS, Renamed
from m3i_fast.export.vit_weights import fitted
from m3i_fast.models.transformer.layers import fc1_features
from m3i_fast.models.transformer.positions import ROTARY_BASE
from m3i_fast.models.transformer.vit import ViT

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeModel:
    """Hold what a folder of transformers is made of: its config.json and its weights."""

    config: dict[str, Any]
    state: State
    class_name: str
    """Class that AutoModel returns."""


def no_class_for(cfg: ViTConfig) -> str:
    """Say why no class of transformers computes what a ViT of `cfg` does; empty where one does."""
    if not cfg.final_norm:
        return "none has no norm after the last block (vision.final_norm False)"
    if cfg.pre_norm:
        return (
            "CLIP's, which has a norm before the first block (vision.pre_norm), returns its tokens "
            "without the norm after the last"
        )
    if cfg.num_prefix == 0 and cfg.position == "rotary":
        return "those with rotary positions have a class token, and this one has no prefix"
    if cfg.num_prefix == 0 and cfg.mlp == "swiglu":
        return "those with SwiGLU have a class token, and this one has no prefix"
    return ""


def native_model(vit: ViT) -> NativeModel:
    """Return a ViT as a model of transformers; its tensors are copies, in fp32 on the CPU.

    Raises ValueError where there is no class for it (`no_class_for`).
    """
    cfg = vit.cfg
    if why := no_class_for(cfg):
        raise ValueError(f"expected a ViT that a class of transformers fits, got another: {why}")
    if cfg.num_prefix == 0:
        return _ijepa(vit)
    return _dinov2(vit) if cfg.position == "absolute" else _dinov3(vit)


def _ijepa(vit: ViT) -> NativeModel:
    cfg = replace(vit.cfg, layer_scale_init=None, key_bias=True)
    config = _common(cfg, "ijepa", "IJepaModel") | {
        "hidden_act": ACTIVATIONS[cfg.mlp],
        "intermediate_size": int(cfg.dim * cfg.mlp_ratio),
        "qkv_bias": cfg.qkv_bias,
    }
    state = _converted(vit, cfg)
    return NativeModel(config=config, state=_theirs(state, cfg, "ijepa"), class_name="IJepaModel")


def _dinov2(vit: ViT) -> NativeModel:
    cfg = replace(vit.cfg, layer_scale_init=1.0, key_bias=True)
    state = _converted(vit, cfg)
    ratio, width = _dinov2_mlp(cfg)
    for index in range(cfg.depth):
        _pad_mlp(state, f"blocks.{index}.layernorm_mlp.", cfg, width)
    class_token = _split_prefix(state)
    position = state["pos_embed"]
    state["pos_embed"] = torch.cat([torch.zeros_like(class_token), position], dim=1)
    name = "Dinov2WithRegistersModel"
    config = _common(cfg, "dinov2_with_registers", name) | {
        "hidden_act": ACTIVATIONS.get(cfg.mlp, "gelu"),  # a SwiGLU has its own
        "mlp_ratio": ratio,
        "use_swiglu_ffn": cfg.mlp == "swiglu",
        "qkv_bias": cfg.qkv_bias,
        "num_register_tokens": cfg.num_prefix - 1,
    }
    other_mlp = "mlp.fc" if cfg.mlp == "swiglu" else "mlp.weights"
    state = _theirs(state, cfg, "dinov2_with_registers", without=other_mlp)
    state["embeddings.mask_token"] = class_token.new_zeros(1, cfg.dim)
    return NativeModel(config=config, state=state, class_name=name)


def _dinov3(vit: ViT) -> NativeModel:
    cfg = replace(vit.cfg, layer_scale_init=1.0)
    state = _converted(vit, replace(cfg, key_bias=True))
    _split_prefix(state)
    gated, name = cfg.mlp == "swiglu", "DINOv3ViTModel"
    config = _common(cfg, "dinov3_vit", name) | {
        "hidden_act": "silu" if gated else ACTIVATIONS[cfg.mlp],
        "intermediate_size": int(cfg.dim * cfg.mlp_ratio),
        "use_gated_mlp": gated,
        "query_bias": cfg.qkv_bias,
        "key_bias": cfg.qkv_bias and cfg.key_bias,
        "value_bias": cfg.qkv_bias,
        "num_register_tokens": cfg.num_prefix - 1,
        "rope_theta": ROTARY_BASE,
        "pos_embed_rescale": None,  # an augmentation of training that ours was not trained with
    }
    state = _theirs(state, cfg, "dinov3_vit", without="mlp.up_proj" if gated else "mlp.gate_proj")
    if not (cfg.qkv_bias and cfg.key_bias):
        state = {name: v for name, v in state.items() if not name.endswith("k_proj.bias")}
    state["embeddings.mask_token"] = torch.zeros(1, 1, cfg.dim)
    return NativeModel(config=config, state=state, class_name=name)


def _common(cfg: ViTConfig, model_type: str, name: str) -> dict[str, Any]:
    return {
        "architectures": [name],
        "model_type": model_type,
        "dtype": "float32",
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "num_channels": 3,
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads,
        "layer_norm_eps": cfg.norm_eps,
    }


def _converted(vit: ViT, cfg: ViTConfig) -> State:
    """Return the weights of a ViT under our names for one of `cfg` with equal features."""
    tensors = {
        name: value.detach().to("cpu", torch.float32, copy=True)
        for name, value in vit.state_dict().items()
    }
    named = Renamed(tensors=tensors, sources={name: name for name in tensors})
    return fitted(named, vit.cfg, cfg, "that of the run").tensors


def _split_prefix(state: State) -> Tensor:  # -> [1, 1, D]
    """Make the first token of the prefix the class token, and the others registers."""
    names = ("class_token", "register_tokens")
    prefix = torch.cat([state.pop(name) for name in names if name in state], dim=1)
    state["class_token"], state["register_tokens"] = prefix[:, :1], prefix[:, 1:]
    return state["class_token"]


def _dinov2_mlp(cfg: ViTConfig) -> tuple[int, int]:
    """Return the least whole mlp_ratio whose hidden layer is wide enough, and its width.

    With SwiGLU the class takes two thirds of it, rounded up to a multiple of 8.
    """
    wanted = int(cfg.dim * cfg.mlp_ratio)
    ratio = 0
    width = 0
    while width < wanted:
        ratio += 1
        width = cfg.dim * ratio
        if cfg.mlp == "swiglu":
            width = (int(width * 2 / 3) + 7) // 8 * 8
    return ratio, width


def _pad_mlp(state: State, prefix: str, cfg: ViTConfig, width: int) -> None:
    """Add hidden units of zeros, which add nothing to what the MLP returns."""
    more = width - state[f"{prefix}fc2_weight"].shape[1]
    state[f"{prefix}fc2_weight"] = F.pad(state[f"{prefix}fc2_weight"], (0, more))
    for kind, padding in (("weight", (0, 0, 0, more)), ("bias", (0, more))):
        name = f"{prefix}fc1_{kind}"
        parts = state[name].chunk(fc1_features(1, cfg.mlp))  # of SwiGLU gate and value
        state[name] = torch.cat([F.pad(part, padding) for part in parts])


def _theirs(
    state: Mapping[str, Tensor], cfg: ViTConfig, model_type: str, *, without: str = "-"
) -> State:
    """Rename our weights, and split those that a class has in parts.

    without: how the first name of rows begins that are of the other kind of MLP.
    """
    names = MODELS[model_type]
    theirs = {row[0]: state[ours] for row, ours in names.stem.items() if ours in state}
    for index in range(cfg.depth):
        prefix = names.block_prefix.format(index)
        for row, ours in names.block.items():
            value = state.get(f"blocks.{index}.{ours}")
            if value is None or ZEROS in row or row[0].startswith(without):
                continue
            parts = value.chunk(len(row))
            theirs |= {f"{prefix}{n}": part for n, part in zip(row, parts, strict=True)}
    return {name: value.clone() for name, value in theirs.items()}
