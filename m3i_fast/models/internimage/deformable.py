"""InternImage's modules: the deformable convolution DCNv3, the layer around it, stage and stem.

Modules are named and nested as in the official code, since these names are the keys of its
checkpoints. Maps are [B, H, W, C]; convolutions see them as channels-last [B, C, H, W] without a
copy. Legend: B batch, H x W cells, C channels, G groups, K = 9 points of the 3x3 kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.fields import DropPathMode, Recompute
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.drop_path import (
    DropPath,
    branch_priorities,
    layer_priorities,
    take_rows,
)
from m3i_fast.models.transformer.layers import LAYER_NORM_EPS, Linear, reset_children
from m3i_fast.ops import dcnv3

KERNEL_SIZE = 3
NUM_POINTS = KERNEL_SIZE**2

SamplingCore = Callable[..., Tensor]  # called as m3i_fast.ops.dcnv3 is


class Permute(nn.Module):
    """A permutation of dimensions, which in a Sequential gives the next norm its official index."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


def to_channels_first(x: Tensor) -> Tensor:
    """View [B, H, W, C] as [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def norm_last(dim: int) -> nn.Sequential:
    """Build a LayerNorm of [..., dim], whose parameters are `0.weight` and `0.bias`."""
    return nn.Sequential(nn.LayerNorm(dim, LAYER_NORM_EPS))


def norm_first(dim: int) -> nn.Sequential:
    """Build a LayerNorm [B, dim, H, W] -> [B, H, W, dim] with `1.weight` and `1.bias`."""
    return nn.Sequential(Permute(0, 2, 3, 1), nn.LayerNorm(dim, LAYER_NORM_EPS))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """The options that all layers of a network share; fields are those of InternImageConfig."""

    mlp_ratio: float
    layer_scale: float | None
    offset_scale: float
    post_norm: bool
    res_post_norm: bool
    dw_kernel_size: int
    center_feature_scale: bool
    drop_path_mode: DropPathMode = "mask"
    activation_checkpointing: Recompute = "none"
    core: SamplingCore = dcnv3
    layers: BlockLayers = TORCH_LAYERS
    """`linear` builds the projections and the MLP, `checkpoint` recomputes them."""


class DCNv3(nn.Module):
    """Deformable convolution v3 (arXiv 2211.05778, equation 2): [B, H, W, C] -> [B, H, W, C].

    y[p] = sum over k of softmax_k(m(p)) * v(p + s * (grid_k + o_k(p))) in each of G groups, where
    the offsets o and the logits m are linear in a depthwise convolution of the input, and s is
    offset_scale. With center_feature_scale, one gate a group then blends y with v[p].
    """

    def __init__(self, channels: int, num_groups: int, options: LayerOptions) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.offset_scale = options.offset_scale
        self.core = options.core
        side = options.dw_kernel_size
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, side, padding=(side - 1) // 2, groups=channels),
            norm_first(channels),
            nn.GELU(),
        )
        self.offset = Linear(channels, 2 * num_groups * NUM_POINTS)
        self.mask = Linear(channels, num_groups * NUM_POINTS)
        self.input_proj = options.layers.linear(channels, channels)
        self.output_proj = options.layers.linear(channels, channels)
        gates = options.center_feature_scale
        self.center_feature_scale_proj_weight = (
            nn.Parameter(torch.empty(num_groups, channels)) if gates else None
        )
        self.center_feature_scale_proj_bias = (
            nn.Parameter(torch.empty(num_groups)) if gates else None
        )
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise as the official code: offsets are 0 and all points weigh the same at first."""
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        for projection in (self.offset, self.mask):
            nn.init.zeros_(projection.weight)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.get_parameter("weight"))
        for gate in (self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias):
            if gate is not None:
                nn.init.zeros_(gate)

    def forward(self, x: Tensor) -> Tensor:
        value = self.input_proj(x)
        offset, mask, gate = self._project(self.dw_conv(to_channels_first(x)))
        y = self.core(
            value,
            offset,
            mask,
            kernel_size=KERNEL_SIZE,
            stride=1,
            padding=KERNEL_SIZE // 2,
            dilation=1,
            groups=self.num_groups,
            offset_scale=self.offset_scale,
            softmax=True,
        )
        if gate is not None:
            groups = (self.num_groups, -1)
            y, value = y.unflatten(-1, groups), value.unflatten(-1, groups)
            y = torch.lerp(y, value, gate.sigmoid()[..., None]).flatten(-2)
        return self.output_proj(y)

    def _project(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute offsets [B, H, W, 2 G K], logits [B, H, W, G K] and gates [B, H, W, G] or None.

        In one matrix product: each of the three has too few columns to occupy a GPU.
        """
        weights: list[Tensor] = [self.offset.weight, self.mask.weight]
        biases: list[Tensor] = [self.offset.bias, self.mask.bias]
        gate_weight = self.center_feature_scale_proj_weight
        gate_bias = self.center_feature_scale_proj_bias
        if gate_weight is not None and gate_bias is not None:
            weights.append(gate_weight)
            biases.append(gate_bias)
        projected = F.linear(context, torch.cat(weights), torch.cat(biases))
        offset, mask, *gate = projected.split([len(weight) for weight in weights], dim=-1)
        return offset.contiguous(), mask.contiguous(), gate[0] if gate else None


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them: [..., dim] -> [..., dim]."""

    def __init__(
        self, dim: int, hidden_dim: int, *, linear: Callable[[int, int], nn.Module] = Linear
    ) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden_dim)
        self.fc2 = linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class InternImageLayer(nn.Module):
    """A layer of DCNv3 and an MLP, each in a residual branch f: [B, H, W, C] -> [B, H, W, C].

    pre-norm: x + drop(scale * f(norm(x))); post_norm: x + drop(scale * norm(f(x)));
    res_post_norm: x + drop(res_post_norm(f(norm(x)))). Without layer_scale the scale is 1.
    """

    def __init__(
        self, channels: int, num_groups: int, options: LayerOptions, *, drop_path: float
    ) -> None:
        super().__init__()
        self.checkpoint = options.layers.checkpoint(options.activation_checkpointing)
        self.post_norm = options.post_norm
        self.layer_scale = options.layer_scale
        self.norm1 = norm_last(channels)
        self.dcn = DCNv3(channels, num_groups, options)
        self.drop_path = DropPath(drop_path, options.drop_path_mode)
        self.norm2 = norm_last(channels)
        hidden_dim = int(channels * options.mlp_ratio)
        self.mlp = MLP(channels, hidden_dim, linear=options.layers.linear)
        scaled, normed = options.layer_scale is not None, options.res_post_norm
        self.gamma1 = nn.Parameter(torch.empty(channels)) if scaled else None
        self.gamma2 = nn.Parameter(torch.empty(channels)) if scaled else None
        self.res_post_norm1 = norm_last(channels) if normed else None
        self.res_post_norm2 = norm_last(channels) if normed else None
        self._reset_own()

    def reset_parameters(self) -> None:
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None and self.layer_scale is not None:
                nn.init.constant_(gamma, self.layer_scale)

    def forward(self, x: Tensor, priority: Tensor | None = None) -> Tensor:
        """Run the layer; priority: [B, 2] int32 of `DropPath`, for both branches."""
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self._run(x, priority)
        return self.checkpoint(self._run, x, priority)

    def _run(self, x: Tensor, priority: Tensor | None) -> Tensor:
        first, second = branch_priorities(priority)
        x = self._add(x, self.dcn, self.norm1, self.res_post_norm1, self.gamma1, first)
        return self._add(x, self.mlp, self.norm2, self.res_post_norm2, self.gamma2, second)

    def _add(
        self,
        x: Tensor,
        body: nn.Module,
        norm: nn.Module,
        res_post_norm: nn.Module | None,
        gamma: Tensor | None,
        priority: Tensor | None,
    ) -> Tensor:
        rows = self.drop_path.draw(x, priority)
        kept = take_rows(x, rows)
        branch = norm(body(kept)) if self.post_norm else body(norm(kept))
        if res_post_norm is not None:
            branch = res_post_norm(branch)
        return self.drop_path.add(x, branch, gamma, rows, priority)


class Stem(nn.Module):
    """The stem, two 3x3 convolutions of stride 2: [B, 3, H, W] -> [B, H / 4, W / 4, channels]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1)
        self.norm1 = norm_first(channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = norm_first(channels)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images.contiguous(memory_format=torch.channels_last))
        x = F.gelu(self.norm1(x))
        return self.norm2(self.conv2(to_channels_first(x)))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2: [B, H, W, C] -> [B, H / 2, W / 2, 2 C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = norm_first(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(to_channels_first(x)))


class Stage(nn.Module):
    """Layers at one resolution, and the downsampling to the next one.

    drop_path: one rate a layer. Each layer in post_norm_ids is followed by one more norm.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int,
        options: LayerOptions,
        *,
        drop_path: list[float],
        downsample: bool,
        post_norm_ids: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.post_norm_ids = post_norm_ids
        self.blocks = nn.ModuleList(
            InternImageLayer(channels, num_groups, options, drop_path=rate) for rate in drop_path
        )
        normed = not options.post_norm or options.center_feature_scale
        self.norm = norm_last(channels) if normed else None
        self.post_norms = (
            nn.ModuleList(norm_last(channels) for _ in post_norm_ids) if post_norm_ids else None
        )
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor, priority: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the stage's map [B, H, W, C] and the next stage's input [B, H / 2, W / 2, 2 C].

        Both are the same tensor after the last stage, which does not downsample. priority: [B, 2 L]
        int32 of the stage's L layers, as `DropPath` takes it.
        """
        for i, block in enumerate(self.blocks):
            x = block(x, layer_priorities(priority, i))
            if self.post_norms is not None and i in self.post_norm_ids:
                x = self.post_norms[self.post_norm_ids.index(i)](x)
        if self.norm is not None:
            x = self.norm(x)
        return x, x if self.downsample is None else self.downsample(x)
