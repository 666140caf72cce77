"""A Transformer's blocks and the Vision Transformer of a model of m3i-fast, in torch alone.

Legend: B pictures, S pixels of a side, R tokens before the patches (class token and registers), N
patches, T tokens, C width of a token, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def parameter(*shape: int) -> nn.Parameter:
    """Make a parameter of zeros, which loading fills."""
    return nn.Parameter(torch.zeros(shape))


class NormLinear(nn.Module):
    """A LayerNorm and a linear layer: [..., C] -> [..., D]."""

    def __init__(self, dim: int, output_dim: int, bias: bool, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.layer_norm_weight, self.layer_norm_bias = parameter(dim), parameter(dim)
        self.weight = parameter(output_dim, dim)
        self.bias = parameter(output_dim) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return F.linear(x, self.weight, self.bias)


def quick_gelu(x: Tensor) -> Tensor:
    """Compute x sigmoid(1.702 x), as OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def swiglu(x: Tensor) -> Tensor:  # [..., 2 F] -> [..., F]
    """Compute silu(gate) * value, the gate first."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
}


class NormMlp(nn.Module):
    """A LayerNorm and two linear layers with one of `ACTIVATIONS` between them."""

    def __init__(self, dim: int, mlp_dim: int, mlp: str, eps: float) -> None:
        super().__init__()
        self.eps, self.activation = eps, ACTIVATIONS[mlp]
        self.layer_norm_weight, self.layer_norm_bias = parameter(dim), parameter(dim)
        fc1_dim = 2 * mlp_dim if mlp == "swiglu" else mlp_dim
        self.fc1_weight, self.fc1_bias = parameter(fc1_dim, dim), parameter(fc1_dim)
        self.fc2_weight, self.fc2_bias = parameter(dim, mlp_dim), parameter(dim)

    def forward(self, x: Tensor) -> Tensor:  # [..., C] -> [..., C]
        x = F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)
        x = self.activation(F.linear(x, self.fc1_weight, self.fc1_bias))
        return F.linear(x, self.fc2_weight, self.fc2_bias)


class Block(nn.Module):
    """A Transformer block with the norms before its branches: [B, T, C] -> [B, T, C]."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        dim, eps = sizes["dim"], sizes["norm_eps"]
        qkv_bias, key_bias = sizes.get("qkv_bias", True), sizes.get("key_bias", True)
        self.num_heads = sizes["num_heads"]
        self.layernorm_qkv = NormLinear(dim, 3 * dim, qkv_bias and key_bias, eps)
        self.proj = nn.Linear(dim, dim)
        self.layernorm_mlp = NormMlp(dim, sizes["mlp_dim"], sizes["mlp"], eps)
        scaled = sizes.get("layer_scale", False)
        self.layer_scale_1 = parameter(dim) if scaled else None
        self.layer_scale_2 = parameter(dim) if scaled else None
        self.query_value_bias = parameter(2 * dim) if qkv_bias and not key_bias else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,  # [B, H, T, T] bool, broadcast: True where attention may go
        rotation: Tensor | None = None,  # [2, R + N, C / H / 2]
    ) -> Tensor:
        attended = self.proj(self._attend(x, mask, rotation))
        x = x + (attended if self.layer_scale_1 is None else attended * self.layer_scale_1)
        branch = self.layernorm_mlp(x)
        return x + (branch if self.layer_scale_2 is None else branch * self.layer_scale_2)

    def _attend(self, x: Tensor, mask: Tensor | None, rotation: Tensor | None) -> Tensor:
        qkv = self.layernorm_qkv(x)
        if self.query_value_bias is not None:
            query, value = self.query_value_bias.chunk(2)
            qkv = qkv + torch.cat([query, torch.zeros_like(query), value])
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)  # [B, H, T, C / H]
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn feature k of the first half of each head with feature k of the second, in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class VisionTransformer(nn.Module):
    """Encode pictures as tokens, prefix first, patches row by row: [B, 3, S, S] -> [B, R + N, C].

    At other sides than the trained one, multiples of the patch, positions are resampled bicubically
    with antialiasing. sizes: image_size, patch_size, dim, depth, num_heads, mlp_dim, mlp (of
    `ACTIVATIONS`), qkv_bias, key_bias, norm_eps, class_token, num_registers, position (absolute or
    rotary), layer_scale, pre_norm (before the first block) and final_norm.
    """

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        dim, patch = sizes["dim"], sizes["patch_size"]
        self.patch_size, self.grid = patch, sizes["image_size"] // patch
        self.head_dim = dim // sizes["num_heads"]
        self.num_prefix = int(sizes["class_token"]) + sizes["num_registers"]
        self.patch_embed = nn.Conv2d(3, dim, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes["depth"]))
        self.norm_pre, self.norm = (
            nn.LayerNorm(dim, sizes["norm_eps"]) if sizes[name] else nn.Identity()
            for name in ("pre_norm", "final_norm")
        )
        absolute, registers = sizes["position"] == "absolute", sizes["num_registers"]
        self.pos_embed = parameter(1, self.grid**2, dim) if absolute else None
        self.class_token = parameter(1, 1, dim) if sizes["class_token"] else None
        self.register_tokens = parameter(1, registers, dim) if registers else None

    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        rotation = None
        if self.pos_embed is None:
            rotation = self._rotation(grid, images.device)
        else:
            tokens = tokens + self._positions(grid)
        prefix = [p for p in (self.class_token, self.register_tokens) if p is not None]
        x = torch.cat([*(p.expand(len(tokens), -1, -1) for p in prefix), tokens], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x, rotation=rotation)
        return self.norm(x)

    def _positions(self, grid: tuple[int, int]) -> Tensor:  # -> [1, N, C]
        assert self.pos_embed is not None
        if grid == (self.grid, self.grid):
            return self.pos_embed
        table = self.pos_embed.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", antialias=True)
        return table.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)

    def _rotation(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return cosines and sines of all tokens, [2, R + N, C / H / 2], as DINOv3 has them."""
        sides = [(torch.arange(n, device=device, dtype=torch.float32) + 0.5) / n for n in grid]
        centres = torch.cartesian_prod(*sides) * 2 - 1  # [N, 2]: row, column
        centres = torch.cat([centres.new_zeros(self.num_prefix, 2), centres])
        exponent = torch.arange(self.head_dim // 4, device=device, dtype=torch.float32)
        frequency = 2 * math.pi * torch.pow(100.0, -4 * exponent / self.head_dim)
        angles = (centres[..., None] * frequency).flatten(1)
        return torch.stack([angles.cos(), angles.sin()])

    def summarise(self, tokens: Tensor) -> Tensor:  # [B, R + N, C] -> [B, C]
        """Average the patches, which is what the heads of training read."""
        return tokens[:, self.num_prefix :].mean(1)
