# SPDX-License-Identifier: Apache-2.0
"""InternImage (arXiv 2211.05778) of a model of m3i-fast, in torch alone.

The deformable convolution is computed by grid_sample, which every device has; it is slower than
the kernels of m3i-fast. Modules are named as in the official code. Legend: B pictures, H x W cells,
C channels, G groups, K = 9 points of the 3x3 kernel, N cells of the tokens, D their width, P width
of the pooled vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class Permute(nn.Module):
    """A permutation of dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def first(x: Tensor) -> Tensor:
    """View [B, H, W, C] as [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def norm_last(dim: int) -> nn.Sequential:
    """Build a LayerNorm of [..., dim]."""
    return nn.Sequential(nn.LayerNorm(dim, EPS))


def norm_first(dim: int) -> nn.Sequential:
    """Build a LayerNorm [B, dim, H, W] -> [B, H, W, dim]."""
    return nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(dim, EPS))


def sample(value: Tensor, offset: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Sum bilinear samples of a 3x3 grid that offsets move and weights weigh, zeros outside.

    value: [B, H, W, C]; offset: [B, H, W, G, K, 2] in cells, (x, y), columns before rows; weight:
    [B, H, W, G, K]; scale: factor of grid and offsets. -> [B, H, W, C]. Places and sums are fp32,
    also in a model of bf16, which has no numbers between 128 and 129 for a place.
    """
    dtype, (batch, height, width) = value.dtype, value.shape[:3]
    wide = torch.promote_types(dtype, torch.float32)
    value, offset, weight = value.to(wide), offset.to(wide), weight.to(wide)
    groups = offset.shape[3]
    steps = torch.arange(-1, 2, device=value.device, dtype=value.dtype)
    grid = torch.cartesian_prod(steps, steps)  # [K, 2]: x, y
    rows = torch.arange(height, device=value.device, dtype=value.dtype)
    columns = torch.arange(width, device=value.device, dtype=value.dtype)
    x = columns[:, None, None] + scale * (grid[:, 0] + offset[..., 0])  # [B, H, W, G, K]
    y = rows[:, None, None, None] + scale * (grid[:, 1] + offset[..., 1])
    places = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    places = places.permute(0, 3, 1, 2, 4, 5).flatten(0, 1).flatten(1, 2)  # [B G, H W, K, 2]
    maps = first(value).unflatten(1, (groups, -1)).flatten(0, 1)  # [B G, C / G, H, W]
    taken = F.grid_sample(maps, places, align_corners=False)  # [B G, C / G, H W, K]
    weights = weight.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)[:, None]
    summed = (taken * weights).sum(-1)  # [B G, C / G, H W]
    return summed.view(batch, -1, height, width).permute(0, 2, 3, 1).to(dtype)


class DCNv3(nn.Module):
    """Deformable convolution v3: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, channels: int, groups: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.groups, self.scale = groups, sizes["offset_scale"]
        side = sizes["dw_kernel_size"]
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, side, padding=side // 2, groups=channels),
            norm_first(channels),
            nn.GELU(),
        )
        self.offset = nn.Linear(channels, 2 * 9 * groups)
        self.mask = nn.Linear(channels, 9 * groups)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        gated = sizes["center_feature_scale"]
        self.center_feature_scale_proj_weight = (
            nn.Parameter(torch.zeros(groups, channels)) if gated else None
        )
        self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(groups)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        value, context = self.input_proj(x), self.dw_conv(first(x))
        offset = self.offset(context).unflatten(-1, (self.groups, 9, 2))
        weight = self.mask(context).unflatten(-1, (self.groups, 9)).softmax(-1)
        y = sample(value, offset, weight, self.scale)
        gate_weight = self.center_feature_scale_proj_weight
        if gate_weight is not None:
            gate = F.linear(context, gate_weight, self.center_feature_scale_proj_bias).sigmoid()
            shape = (self.groups, -1)
            blended = torch.lerp(
                y.unflatten(-1, shape), value.unflatten(-1, shape), gate[..., None]
            )
            y = blended.flatten(-2)
        return self.output_proj(y)


class MLP(nn.Module):
    """Two linear layers with GELU between them: [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    """DCNv3 and an MLP, each in a residual branch: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, channels: int, groups: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.post_norm = sizes["post_norm"]
        self.norm1, self.norm2 = norm_last(channels), norm_last(channels)
        self.dcn = DCNv3(channels, groups, sizes)
        self.mlp = MLP(channels, int(channels * sizes["mlp_ratio"]))
        scaled, normed = sizes["layer_scale"], sizes["res_post_norm"]
        self.gamma1 = nn.Parameter(torch.zeros(channels)) if scaled else None
        self.gamma2 = nn.Parameter(torch.zeros(channels)) if scaled else None
        self.res_post_norm1 = norm_last(channels) if normed else None
        self.res_post_norm2 = norm_last(channels) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.dcn, self.norm1, self.res_post_norm1, self.gamma1)
        return self._add(x, self.mlp, self.norm2, self.res_post_norm2, self.gamma2)

    def _add(
        self,
        x: Tensor,
        body: nn.Module,
        norm: nn.Module,
        res_post_norm: nn.Module | None,
        gamma: Tensor | None,
    ) -> Tensor:
        branch = norm(body(x)) if self.post_norm else body(norm(x))
        if res_post_norm is not None:
            branch = res_post_norm(branch)
        return x + (branch if gamma is None else branch * gamma)


class Stem(nn.Module):
    """Two convolutions of stride 2: [B, 3, S, S] -> [B, S / 4, S / 4, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = norm_first(channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = norm_first(channels)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(images)))
        return self.norm2(self.conv2(first(x)))


class Downsample(nn.Module):
    """A convolution of stride 2: [B, H, W, C] -> [B, H / 2, W / 2, 2 C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = norm_first(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(first(x)))


class Stage(nn.Module):
    """Layers at one resolution, and the downsampling to the next one."""

    def __init__(self, index: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        channels, groups = sizes["channels"] * 2**index, sizes["groups"][index]
        self.post_norm_ids = sizes["post_norm_ids"] if index == 2 else []
        self.blocks = nn.ModuleList(
            Layer(channels, groups, sizes) for _ in range(sizes["depths"][index])
        )
        normed = not sizes["post_norm"] or sizes["center_feature_scale"]
        self.norm = norm_last(channels) if normed else None
        self.post_norms = (
            nn.ModuleList(norm_last(channels) for _ in self.post_norm_ids)
            if self.post_norm_ids
            else None
        )
        self.downsample = Downsample(channels) if index < 3 else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.post_norms is not None and i in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(i)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x, x if self.downsample is None else self.downsample(x)


class CrossAttention(nn.Module):
    """Multi-head cross attention: [B, m, D], [B, n, D], [B, n, D] -> [B, m, P]."""

    def __init__(self, dim: int, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(3))
        self.proj = nn.Linear(dim, output_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = ((self.q, self.q_bias), (self.k, self.k_bias), (self.v, self.v_bias))
        heads = [
            F.linear(x, layer.weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, (layer, bias) in zip((q, k, v), weights, strict=True)
        ]
        out = F.scaled_dot_product_attention(*heads)
        return self.proj(out.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """Pool tokens by the attention of their mean: [B, n, D] -> [B, P]."""

    def __init__(self, dim: int, num_heads: int, output_dim: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (norm_last(dim) for _ in range(3))
        self.cross_dcn = CrossAttention(dim, num_heads, output_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)


class InternImage(nn.Module):
    """Encode pictures as tokens at stride 16, row by row: [B, 3, S, S] -> [B, N, D].

    Sides are multiples of 32. sizes: channels, depths, groups, mlp_ratio, offset_scale,
    dw_kernel_size, post_norm, res_post_norm, layer_scale, center_feature_scale, post_norm_ids, dim,
    pool_heads and pooled_dim.
    """

    num_prefix = 0

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, dim = sizes["channels"] * 8, sizes["dim"]
        self.patch_embed = Stem(sizes["channels"])
        self.levels = nn.ModuleList(Stage(index, sizes) for index in range(4))
        self.dcnv3_head_x4 = nn.Sequential(nn.Conv2d(width, 4 * dim, 1), nn.PixelShuffle(2))
        self.dcnv3_head_x3 = nn.Conv2d(width // 2, dim, 1)
        self.clip_projector = AttentionPool(dim, sizes["pool_heads"], sizes["pooled_dim"])
        self.fc_norm = norm_last(sizes["pooled_dim"])

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        maps = []
        for level in self.levels:
            stage_map, x = level(x)
            maps.append(stage_map)
        fine, coarse = self.dcnv3_head_x3(first(maps[2])), self.dcnv3_head_x4(first(maps[3]))
        return (fine + coarse).flatten(2).transpose(1, 2)

    def summarise(self, tokens: Tensor) -> Tensor:  # [B, N, D] -> [B, P]
        """Pool the tokens by attention, which is what the heads of training read."""
        return self.fc_norm(self.clip_projector(tokens))
