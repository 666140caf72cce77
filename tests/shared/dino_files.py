"""Random weights under the names that DINOv2's and DINOv3's repositories write to files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from m3i_fast.config.models.vit import ViTConfig

State = dict[str, Tensor]


def dinov2_file(cfg: ViTConfig) -> State:
    """Random weights under DINOv2's names: the position of the class token is in the table."""
    dim, hidden = cfg.dim, int(cfg.dim * cfg.mlp_ratio)
    gated = cfg.mlp == "swiglu"
    first, last = ("mlp.w12", "mlp.w3") if gated else ("mlp.fc1", "mlp.fc2")
    state = {
        "cls_token": (1, 1, dim),
        "mask_token": (1, dim),
        "pos_embed": (1, 1 + cfg.num_patches, dim),
        "patch_embed.proj.weight": (dim, 3, cfg.patch_size, cfg.patch_size),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
    }
    if cfg.num_registers:
        state["register_tokens"] = (1, cfg.num_registers, dim)
    for i in range(cfg.depth):
        block = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            first: (hidden * (1 + gated), dim),
            last: (dim, hidden),
        }
        for name, shape in block.items():
            state[f"blocks.{i}.{name}.weight"] = shape
            state[f"blocks.{i}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[f"blocks.{i}.{name}"] = (dim,)
        state |= {f"blocks.{i}.ls{n}.gamma": (dim,) for n in (1, 2)}
    return {name: 0.2 * torch.randn(shape) for name, shape in state.items()}


def dinov3_file(cfg: ViTConfig) -> State:
    """The same under DINOv3's names: no table, biases of keys masked, buffers, a split gate."""
    state = dinov2_file(replace(cfg, mlp="gelu"))
    del state["pos_embed"]
    state["storage_tokens"] = state.pop("register_tokens")
    state["rope_embed.periods"] = torch.ones(8, dtype=torch.bfloat16)
    state["mask_token"] = torch.zeros(1, cfg.dim)
    for i in range(cfg.depth):
        mask = torch.ones(3 * cfg.dim)
        mask[cfg.dim : 2 * cfg.dim] = torch.nan
        state[f"blocks.{i}.attn.qkv.bias_mask"] = mask
        if cfg.mlp == "swiglu":
            for kind in ("weight", "bias"):
                value = state.pop(f"blocks.{i}.mlp.fc1.{kind}")
                state[f"blocks.{i}.mlp.w1.{kind}"] = value
                state[f"blocks.{i}.mlp.w2.{kind}"] = torch.randn_like(value)
                state[f"blocks.{i}.mlp.w3.{kind}"] = state.pop(f"blocks.{i}.mlp.fc2.{kind}")
    return state
