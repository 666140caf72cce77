"""Transformer block whose parameters are named as Transformer Engine names them.

Letters: B batch, T tokens, D width, H heads, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.fields import DropPathMode, Recompute
from m3i_fast.models.recompute import Checkpoint, torch_checkpoint
from m3i_fast.models.transformer.positions import rotate

LAYER_NORM_EPS = 1e-6  # timm, MAE and DINO; Transformer Engine's own default is 1e-5
INIT_STD = 0.02

# (x [..., K], weight [N, K], bias [N] or None) -> [..., N], as F.linear
Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def init_weight(weight: Tensor) -> None:
    """Truncated normal, standard deviation 0.02, as timm initialises a ViT's linear layers."""
    nn.init.trunc_normal_(weight, std=INIT_STD)


def reset_children(module: nn.Module, *, but: Collection[nn.Module] = ()) -> None:
    """Initialise everything below `module` again, in the order of construction, without `but`."""
    for child in module.children():
        if child not in but:
            reset(child, but=but)


def reset(module: nn.Module, *, but: Collection[nn.Module] = ()) -> None:
    """Initialise `module` again: by its `reset_parameters`, or all below it that have one."""
    own = getattr(module, "reset_parameters", None)
    if own is None:
        reset_children(module, but=but)
    else:
        own()


class Linear(nn.Linear):
    """Linear layer with a ViT's initialisation: weight [out, in], bias [out]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, matmul: Matmul = F.linear
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.matmul(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        init_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class LayerNormLinear(nn.Module):
    """LayerNorm then Linear: [..., in_features] -> [..., out_features]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, matmul: Matmul = F.linear
    ) -> None:
        super().__init__()
        self.matmul = matmul
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features))
        self.layer_norm_bias = nn.Parameter(torch.empty(in_features))
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.layer_norm_weight)
        nn.init.zeros_(self.layer_norm_bias)
        init_weight(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        norm_weight, norm_bias = self.layer_norm_weight, self.layer_norm_bias
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, LAYER_NORM_EPS)
        return self.matmul(x, self.weight, self.bias)


class LayerNormMLP(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden_dim: int, *, matmul: Matmul = F.linear) -> None:
        super().__init__()
        self.matmul = matmul
        self.layer_norm_weight = nn.Parameter(torch.empty(dim))
        self.layer_norm_bias = nn.Parameter(torch.empty(dim))
        self.fc1_weight = nn.Parameter(torch.empty(hidden_dim, dim))
        self.fc1_bias = nn.Parameter(torch.empty(hidden_dim))
        self.fc2_weight = nn.Parameter(torch.empty(dim, hidden_dim))
        self.fc2_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.layer_norm_weight)
        init_weight(self.fc1_weight)
        init_weight(self.fc2_weight)
        for bias in (self.layer_norm_bias, self.fc1_bias, self.fc2_bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        norm_weight, norm_bias = self.layer_norm_weight, self.layer_norm_bias
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, LAYER_NORM_EPS)
        x = F.gelu(self.matmul(x, self.fc1_weight, self.fc1_bias))
        return self.matmul(x, self.fc2_weight, self.fc2_bias)


def turned(qkv: Sequence[Tensor], rotation: Tensor | None) -> Sequence[Tensor]:
    """q, k, v [B, T, H, D / H] each; q and k by the rotation of their tokens, if there is one."""
    if rotation is None:
        return qkv
    q, k, v = qkv
    return rotate(q, rotation), rotate(k, rotation), v


class Attention(nn.Module):
    """Scaled dot-product self-attention of all tokens with all tokens; no parameters."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    def forward(
        self, qkv: Tensor, key_mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """[B, T, 3 D] (q; k; v, each head after head) -> [B, T, D].

        key_mask: [B, T] bool, True where the token is real and may be attended to. rotation:
        [B, T, 2, D / H / 2] of the tokens' places (`positions.rotary`).
        """
        B, T, _ = qkv.shape
        parts = qkv.view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in turned(parts, rotation))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, T, D / H]
        return out.transpose(1, 2).flatten(2)


def num_kept(num_samples: int, rate: float) -> int:
    """Samples of a batch that go through a branch with stochastic depth by subset: at least one."""
    return max(1, round(num_samples * (1 - rate)))


class DropPath(nn.Module):
    """Stochastic depth: leaves a residual branch out for whole samples, when training.

    mask: each sample by its own draw, after the work; the others' branch is scaled by 1 / keep.
    subset: a share of each batch that is always the same, before the work, which is not done for
    it (DINOv2); the others' branch is scaled by B over their number.
    """

    def __init__(self, rate: float, mode: DropPathMode = "mask") -> None:
        super().__init__()
        self.rate, self.mode = rate, mode

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, mode={self.mode}"

    def forward(self, branch: Tensor) -> Tensor:  # [B, ...] -> [B, ...]
        """The branch with samples masked."""
        if not self.training or self.rate == 0.0 or self.mode == "subset":
            return branch
        keep = 1.0 - self.rate
        one_a_sample = (branch.shape[0], *(1,) * (branch.ndim - 1))
        return branch * branch.new_empty(one_a_sample).bernoulli_(keep).div_(keep)

    def draw(self, x: Tensor) -> Tensor | None:
        """Samples of x [B, ...] that go through the branch: [kept] int64; None for all of them."""
        if not self.training or self.rate == 0.0 or self.mode == "mask":
            return None
        return torch.randperm(len(x), device=x.device)[: num_kept(len(x), self.rate)]

    def add(self, x: Tensor, branch: Tensor, scale: Tensor | None, rows: Tensor | None) -> Tensor:
        """x + scale * branch, of the samples `rows` that were drawn for it, or of all of them."""
        if rows is not None:
            branch = branch if scale is None else branch * scale
            return x.index_add(0, rows, branch.to(x.dtype), alpha=len(x) / len(rows))
        branch = self(branch)
        # one pass instead of two over the branch
        return x + branch if scale is None else torch.addcmul(x, branch, scale)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of x [B, ...], or all of it."""
    return x if rows is None else x[rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayers:
    """Constructors of a block's parts; another library's body has the same state dict.

    Every part but `attention` has `reset_parameters()`.
    """

    layernorm_linear: Callable[[int, int, bool], nn.Module]  # in_features, out_features, bias
    attention: Callable[[int, int], nn.Module]  # num_heads, head_dim
    linear: Callable[[int, int], nn.Module]  # in_features, out_features
    layernorm_mlp: Callable[[int, int], nn.Module]  # dim, hidden_dim
    checkpoint: Callable[[Recompute], Checkpoint | None] = torch_checkpoint


TORCH_LAYERS = BlockLayers(
    layernorm_linear=LayerNormLinear,
    attention=Attention,
    linear=Linear,
    layernorm_mlp=LayerNormMLP,
)


class Block(nn.Module):
    """Pre-norm Transformer block with optional LayerScale and DropPath: [B, T, D] -> [B, T, D].

    x <- x + drop(scale_1 * proj(attention(layernorm_qkv(x))))
    x <- x + drop(scale_2 * layernorm_mlp(x))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale_init: float | None = None,
        drop_path: float = 0.0,
        drop_path_mode: DropPathMode = "mask",
        activation_checkpointing: Recompute = "none",
        layers: BlockLayers = TORCH_LAYERS,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads = {num_heads}, got {dim}")
        self.layer_scale_init = layer_scale_init
        self.checkpoint = layers.checkpoint(activation_checkpointing)
        self.layernorm_qkv = layers.layernorm_linear(dim, 3 * dim, qkv_bias)
        self.attention = layers.attention(num_heads, dim // num_heads)
        self.proj = layers.linear(dim, dim)
        self.layernorm_mlp = layers.layernorm_mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path, drop_path_mode)
        scaled = layer_scale_init is not None
        self.layer_scale_1 = nn.Parameter(torch.empty(dim)) if scaled else None
        self.layer_scale_2 = nn.Parameter(torch.empty(dim)) if scaled else None
        self._reset_layer_scale()

    def reset_parameters(self) -> None:
        reset_children(self)
        self._reset_layer_scale()

    def _reset_layer_scale(self) -> None:
        if self.layer_scale_init is not None:
            for scale in (self.layer_scale_1, self.layer_scale_2):
                assert scale is not None
                nn.init.constant_(scale, self.layer_scale_init)

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        *,
        num_last: int | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """key_mask: [B, T] bool, True where the token is real; None attends to every token.

        num_last: return the last tokens only, [B, num_last, D], without computing the others.
        rotation: [B, T, 2, D / H / 2], by which queries and keys are turned.
        """
        if self.checkpoint is None or not torch.is_grad_enabled():
            return self._run(x, key_mask, num_last, rotation)
        return self.checkpoint(self._run, x, key_mask, num_last, rotation)

    def _run(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        num_last: int | None,
        rotation: Tensor | None,
    ) -> Tensor:
        drop, rows = self.drop_path, self.drop_path.draw(x)
        key_mask = None if key_mask is None else take(key_mask, rows)
        rotation = None if rotation is None else take(rotation, rows)
        attended = self.attention(self.layernorm_qkv(take(x, rows)), key_mask, rotation)
        if num_last is not None:
            first = x.shape[1] - num_last
            x, attended = x[:, first:], attended[:, first:]
        x = drop.add(x, self.proj(attended), self.layer_scale_1, rows)
        rows = drop.draw(x)
        return drop.add(x, self.layernorm_mlp(take(x, rows)), self.layer_scale_2, rows)
