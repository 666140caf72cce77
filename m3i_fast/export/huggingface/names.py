"""Names of a Vision Transformer's weights in the files of transformers' models, and ours for them.

A row is (their names, joined in this order) -> our name, as in `vit_names`. The names are those of
the files on the hub, which `save_pretrained` writes, and not those of the modules, which change
from one version of transformers to the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m3i_fast.config.fields import Mlp
from m3i_fast.export.vit_names import ZEROS, Names

ACTIVATIONS: Mapping[Mlp, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
}
"""Their `hidden_act` of each MLP without a gate."""
_KINDS = ("weight", "bias")


def _pairs(theirs: str, ours: str) -> Names:
    """Return the rows of a module's weight and bias; `ours` ends where weight or bias follows."""
    return {(f"{theirs}.{kind}",): f"{ours}{kind}" for kind in _KINDS}


def _qkv(query: str, key: str, value: str) -> Names:
    """Return the rows of three matrices with all biases, and with that of keys missing."""
    names = (query, key, value)
    rows = {tuple(f"{name}.{kind}" for name in names): f"layernorm_qkv.{kind}" for kind in _KINDS}
    return rows | {(f"{query}.bias", ZEROS, f"{value}.bias"): "layernorm_qkv.bias"}


_PROJECTED_PATCHES = _pairs("embeddings.patch_embeddings.projection", "patch_embed.")
_ATTENTION = {
    **_qkv(*(f"attention.attention.{name}" for name in ("query", "key", "value"))),
    **_pairs("attention.output.dense", "proj."),
}
_MLP = {
    **_pairs("mlp.fc1", "layernorm_mlp.fc1_"),
    **_pairs("mlp.fc2", "layernorm_mlp.fc2_"),
}
_DINO_BLOCK = {
    **_pairs("norm1", "layernorm_qkv.layer_norm_"),
    **_pairs("norm2", "layernorm_mlp.layer_norm_"),
    ("layer_scale1.lambda1",): "layer_scale_1",
    ("layer_scale2.lambda1",): "layer_scale_2",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNames:
    """Hold the names in the files of one class of models."""

    stem: Names
    block: Names
    """Rows below the prefix of a block; a row before another that shares names goes first."""
    block_prefix: str
    """Prefix of the weights of block i, with {} for i."""
    prefixes: Sequence[str]
    """What may stand before all names of the encoder in a file of a model with heads."""


_VIT = ModelNames(
    stem={
        ("embeddings.cls_token",): "class_token",
        ("embeddings.position_embeddings",): "pos_embed",
        **_PROJECTED_PATCHES,
        **_pairs("layernorm", "norm."),
    },
    block={
        **_pairs("layernorm_before", "layernorm_qkv.layer_norm_"),
        **_ATTENTION,
        **_pairs("layernorm_after", "layernorm_mlp.layer_norm_"),
        **_pairs("intermediate.dense", "layernorm_mlp.fc1_"),
        **_pairs("output.dense", "layernorm_mlp.fc2_"),
    },
    block_prefix="encoder.layer.{}.",
    prefixes=("vit.", "ijepa."),
)
_DINOV2 = ModelNames(
    stem={**_VIT.stem, ("embeddings.register_tokens",): "register_tokens"},
    block={
        **_DINO_BLOCK,
        **_ATTENTION,
        **_MLP,
        **_pairs("mlp.weights_in", "layernorm_mlp.fc1_"),
        **_pairs("mlp.weights_out", "layernorm_mlp.fc2_"),
    },
    block_prefix="encoder.layer.{}.",
    prefixes=("dinov2.", "dinov2_with_registers."),
)
_DINOV3 = ModelNames(
    stem={
        ("embeddings.cls_token",): "class_token",
        ("embeddings.register_tokens",): "register_tokens",
        **_pairs("embeddings.patch_embeddings", "patch_embed."),
        **_pairs("norm", "norm."),
    },
    block={
        **_DINO_BLOCK,
        **_qkv("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        **_pairs("attention.o_proj", "proj."),
        **{
            (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}"): f"layernorm_mlp.fc1_{kind}"
            for kind in _KINDS
        },
        **_pairs("mlp.up_proj", "layernorm_mlp.fc1_"),
        **_pairs("mlp.down_proj", "layernorm_mlp.fc2_"),
    },
    block_prefix="layer.{}.",
    prefixes=("dinov3_vit.",),
)
_SIGLIP = ModelNames(
    stem={
        ("embeddings.position_embedding.weight",): "pos_embed",
        **_pairs("embeddings.patch_embedding", "patch_embed."),
        **_pairs("post_layernorm", "norm."),
    },
    block={
        **_pairs("layer_norm1", "layernorm_qkv.layer_norm_"),
        **_qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        **_pairs("self_attn.out_proj", "proj."),
        **_pairs("layer_norm2", "layernorm_mlp.layer_norm_"),
        **_MLP,
    },
    block_prefix="encoder.layers.{}.",
    prefixes=("vision_model.",),
)
_CLIP = ModelNames(
    stem={
        ("embeddings.class_embedding",): "class_token",
        **_pairs("pre_layrnorm", "norm_pre."),
        **_SIGLIP.stem,
    },
    block=_SIGLIP.block,
    block_prefix=_SIGLIP.block_prefix,
    prefixes=_SIGLIP.prefixes,
)
CLIP_TEXT = ModelNames(
    stem={
        ("text_model.embeddings.token_embedding.weight",): "token_embedding.weight",
        ("text_model.embeddings.position_embedding.weight",): "pos_embed",
        **_pairs("text_model.final_layer_norm", "norm."),
        ("text_projection.weight",): "projection.weight",
    },
    block=_SIGLIP.block,
    block_prefix="text_model.encoder.layers.{}.",
    prefixes=(),
)
"""The names of CLIP's text tower, with its prefix."""
MODELS: Mapping[str, ModelNames] = {
    "vit": _VIT,
    "vit_mae": _VIT,
    "ijepa": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _DINOV3,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
}
"""The names of each `model_type` of a config.json."""
