"""Names of a Vision Transformer's weights in timm, DINOv2, DINOv3 and open_clip, and ours for them.

A table a family: (their names, joined in this order) -> our name. Rows of queries come before those
of keys and values, and a gate before its value, in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from m3i_fast.export.weight_files import some

Family = Literal["timm", "dinov2", "dinov3", "open_clip"]
Names = Mapping[tuple[str, ...], str]

ZEROS = ""  # in the place of a name: zeros, as many as the first part has

# of timm's VisionTransformer, and most of the others'
VIT_STEM: Names = {
    ("patch_embed.proj.weight",): "patch_embed.weight",
    ("patch_embed.proj.bias",): "patch_embed.bias",
    ("pos_embed",): "pos_embed",
    ("cls_token",): "class_token",
    ("norm_pre.weight",): "norm_pre.weight",
    ("norm_pre.bias",): "norm_pre.bias",
    ("norm.weight",): "norm.weight",
    ("norm.bias",): "norm.bias",
}
VIT_BLOCK: Names = {
    ("norm1.weight",): "layernorm_qkv.layer_norm_weight",
    ("norm1.bias",): "layernorm_qkv.layer_norm_bias",
    ("attn.qkv.weight",): "layernorm_qkv.weight",
    ("attn.qkv.bias",): "layernorm_qkv.bias",
    ("attn.proj.weight",): "proj.weight",
    ("attn.proj.bias",): "proj.bias",
    ("norm2.weight",): "layernorm_mlp.layer_norm_weight",
    ("norm2.bias",): "layernorm_mlp.layer_norm_bias",
    ("mlp.fc1.weight",): "layernorm_mlp.fc1_weight",
    ("mlp.fc1.bias",): "layernorm_mlp.fc1_bias",
    ("mlp.fc2.weight",): "layernorm_mlp.fc2_weight",
    ("mlp.fc2.bias",): "layernorm_mlp.fc2_bias",
    ("ls1.gamma",): "layer_scale_1",
    ("ls2.gamma",): "layer_scale_2",
}
_EVA: Names = {  # timm's Eva, which has DINOv3
    ("gamma_1",): "layer_scale_1",
    ("gamma_2",): "layer_scale_2",
    ("attn.q_bias", ZEROS, "attn.v_bias"): "layernorm_qkv.bias",
    ("mlp.fc1_g.weight", "mlp.fc1_x.weight"): "layernorm_mlp.fc1_weight",
    ("mlp.fc1_g.bias", "mlp.fc1_x.bias"): "layernorm_mlp.fc1_bias",
}
OPEN_CLIP_BLOCK: Names = {  # of its image tower, below visual., and of its text tower
    ("ln_1.weight",): "layernorm_qkv.layer_norm_weight",
    ("ln_1.bias",): "layernorm_qkv.layer_norm_bias",
    ("attn.in_proj_weight",): "layernorm_qkv.weight",
    ("attn.in_proj_bias",): "layernorm_qkv.bias",
    ("attn.out_proj.weight",): "proj.weight",
    ("attn.out_proj.bias",): "proj.bias",
    ("ln_2.weight",): "layernorm_mlp.layer_norm_weight",
    ("ln_2.bias",): "layernorm_mlp.layer_norm_bias",
    ("mlp.c_fc.weight",): "layernorm_mlp.fc1_weight",
    ("mlp.c_fc.bias",): "layernorm_mlp.fc1_bias",
    ("mlp.c_proj.weight",): "layernorm_mlp.fc2_weight",
    ("mlp.c_proj.bias",): "layernorm_mlp.fc2_bias",
    ("ls_1.gamma",): "layer_scale_1",
    ("ls_2.gamma",): "layer_scale_2",
}
OPEN_CLIP_RESBLOCKS = "transformer.resblocks."  # where they have blocks.
STEM: Mapping[Family, Names] = {
    "timm": {**VIT_STEM, ("reg_token",): "register_tokens"},
    "dinov2": {**VIT_STEM, ("register_tokens",): "register_tokens"},
    "dinov3": {**VIT_STEM, ("storage_tokens",): "register_tokens"},
    "open_clip": {
        ("visual.conv1.weight",): "patch_embed.weight",
        ("visual.positional_embedding",): "pos_embed",
        ("visual.class_embedding",): "class_token",
        ("visual.ln_pre.weight",): "norm_pre.weight",
        ("visual.ln_pre.bias",): "norm_pre.bias",
        ("visual.ln_post.weight",): "norm.weight",
        ("visual.ln_post.bias",): "norm.bias",
    },
}
BLOCK: Mapping[Family, Names] = {
    "timm": {**VIT_BLOCK, **_EVA},
    "dinov2": {
        **VIT_BLOCK,
        ("mlp.w12.weight",): "layernorm_mlp.fc1_weight",
        ("mlp.w12.bias",): "layernorm_mlp.fc1_bias",
        ("mlp.w3.weight",): "layernorm_mlp.fc2_weight",
        ("mlp.w3.bias",): "layernorm_mlp.fc2_bias",
    },
    "dinov3": {
        **VIT_BLOCK,
        ("mlp.w1.weight", "mlp.w2.weight"): "layernorm_mlp.fc1_weight",
        ("mlp.w1.bias", "mlp.w2.bias"): "layernorm_mlp.fc1_bias",
        ("mlp.w3.weight",): "layernorm_mlp.fc2_weight",
        ("mlp.w3.bias",): "layernorm_mlp.fc2_bias",
    },
    "open_clip": OPEN_CLIP_BLOCK,
}
# A file's other weights are heads, mask tokens and buffers. One with these in its name is part of
# what an encoder computes, and one that no table has makes it another network.
_ENCODER = ("blocks.", "patch_embed.", "norm_pre.", "pos_embed", "rope.", "visual.")
_PROJECTION = "visual.proj"  # of open_clip's image tower, which follows the encoder
# By these names a file is told apart from those of other programs.
_SIGNS = {"open_clip": ("visual.conv1.weight", "blocks.0.ln_1.weight")}
_OTHER_SIGNS = ("patch_embed.proj.weight", "blocks.0.norm1.weight")
_MASKED_KEYS = ".attn.qkv.bias_mask"  # a buffer of DINOv3: the bias of its keys does not count
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")  # a training run's: blocks.CHUNK.INDEX


@dataclass(kw_only=True, slots=True)
class Renamed:
    """Hold the weights of a file under our names, in their own sizes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    """Their names of each, by ours."""
    left_out: list[str] = field(default_factory=list)
    """Names that are no part of an encoder."""


def renamed(state: Mapping[str, Tensor], family: Family) -> Renamed:
    """Give the weights of a file our names; halves are widened to fp32.

    A prefix `module.` or `backbone.`, and the chunks of blocks of a training run, are removed.
    Raises ValueError where the names are those of another family or of none, and for an encoder's
    weights that our ViT has no place for.
    """
    rest = {name: value.float() for name, value in _plain(state).items()}
    _expect_family(rest, family)
    found = Renamed()
    for theirs, ours in STEM[family].items():
        take_weight(rest, theirs, ours, found)
    depth = 1 + max(int(name.split(".")[1]) for name in rest if name.startswith("blocks."))
    for index in range(depth):
        prefix = f"blocks.{index}."
        for theirs, ours in BLOCK[family].items():
            take_weight(rest, theirs, f"{prefix}{ours}", found, prefix)
    masked = [name for name in rest if name.endswith(_MASKED_KEYS)]
    for name in masked:
        ours = name.removesuffix(_MASKED_KEYS) + ".layernorm_qkv.bias"
        query, key, value = found.tensors[ours].chunk(3)
        found.tensors[ours] = torch.cat([query, torch.zeros_like(key), value])
    exempt = {*masked, _PROJECTION}
    unknown = [name for name in rest if name.startswith(_ENCODER) and name not in exempt]
    if unknown:
        raise ValueError(
            f"expected an encoder that our ViT can be, got more in it: {some(unknown)}"
        )
    found.left_out = list(rest)
    return found


def take_weight(
    rest: dict[str, Tensor],
    theirs: tuple[str, ...],
    ours: str,
    found: Renamed,
    prefix: str = "",
) -> None:
    """Move the parts of one weight from `rest` to `found`, where all of them are there.

    prefix: what stands before each of their names.
    """
    names = [f"{prefix}{name}" for name in theirs if name != ZEROS]
    if any(name not in rest for name in names):
        return
    zeros = torch.zeros_like(rest[names[0]])
    parts = [zeros if name == ZEROS else rest.pop(f"{prefix}{name}") for name in theirs]
    found.tensors[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    found.sources[ours] = " + ".join(names)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without prefixes of training programs; below `backbone.` alone if any."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name.startswith("backbone.") for name in state):
        state = {
            name.removeprefix("backbone."): value
            for name, value in state.items()
            if name.startswith("backbone.")
        }
    return {_CHUNK.sub(r"blocks.\1", name): value for name, value in state.items()}


def _expect_family(state: Mapping[str, Tensor], family: Family) -> None:
    """Raise ValueError where the names are not those of the family, naming the one they are of."""
    own = _all_names(family)
    for other in STEM:
        theirs = _all_names(other) - own
        found = [name for name in state if _below_block(name) in theirs]
        if found:
            raise ValueError(
                f"expected the names of {family}, got {found[0]}, which is a name of {other}: type "
                f"{other}: in place of {family}:"
            )
    signs = _SIGNS.get(family, _OTHER_SIGNS)
    if any(name not in state for name in signs):
        raise ValueError(
            f"expected the names of {family}, such as {' and '.join(signs)}, got "
            f"{some(list(state)[:5]) or 'no tensor'}"
        )


def _all_names(family: Family) -> set[str]:
    parts = (*STEM[family], *BLOCK[family])
    return {name for theirs in parts for name in theirs if name != ZEROS}


def _below_block(name: str) -> str:
    return name.split(".", 2)[2] if re.match(r"blocks\.\d+\.", name) else name
