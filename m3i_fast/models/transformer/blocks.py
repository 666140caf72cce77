"""The Transformer block in torch, with Transformer Engine's parameter names.

Legend: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from m3i_fast.config.fields import DropPathMode, Mlp, Recompute
from m3i_fast.models.activation_checkpointing import Checkpoint, torch_checkpoint
from m3i_fast.models.transformer.drop_path import (
    DropPath,
    branch_priorities,
    take_rows,
)
from m3i_fast.models.transformer.layers import (
    LAYER_NORM_EPS,
    LayerNormLinear,
    LayerNormMLP,
    Linear,
    Normed,
    Residual,
    Stream,
    reset_children,
)
from m3i_fast.models.transformer.packing import Packed, pack_last, unpack
from m3i_fast.models.transformer.positions import rotate

MASK_ALIGNMENT = 16  # elements, of the rows of a mask for torch's memory-efficient attention


def add_and_run(
    layer: nn.Module,
    stream: Residual,
    rows: Tensor | None = None,  # [kept] int64
) -> tuple[Tensor, Tensor]:
    """Return the sum of the stream, and what a layer that begins with a norm computes of it.

    In one pass where the layer is ours; another library's is given the sum. rows: the samples that
    the layer computes, None for all.
    """
    if rows is None and isinstance(layer, Normed):
        both: tuple[Tensor, Tensor] = layer(stream)
        return both
    x = stream.total()
    return x, layer(take_rows(x, rows))


def rotate_qk(qkv: Sequence[Tensor], rotation: Tensor | None) -> Sequence[Tensor]:
    """Apply rotary positions to q and k of (q, k, v), each [B, T, H, D / H].

    rotation: [B, T, 2, D / H / 2] of `positions.rotary`; None returns `qkv` itself.
    """
    if rotation is None:
        return qkv
    q, k, v = qkv
    return rotate(q, rotation), rotate(k, rotation), v


class Attention(nn.Module):
    """Scaled dot-product self-attention without parameters, of all tokens with all tokens.

    causal: of each token with itself and those before it.
    """

    def __init__(self, num_heads: int, head_dim: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.causal = num_heads, head_dim, causal

    def prepare_mask(self, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what the kernels of all layers add to logits: [B, T] bool -> [B, 1, 1, T] `dtype`.

        dtype: that of q and k. A mask of bool is converted and aligned anew in every layer.
        """
        length = key_mask.shape[1]
        aligned = -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT
        shape = key_mask.shape[0], 1, 1, aligned
        bias = key_mask.new_zeros(shape, dtype=dtype)[..., :length]
        return bias.masked_fill_(~key_mask[:, None, None], -torch.inf)

    def forward(
        self, qkv: Tensor, key_mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        """Attend from every token to every token: [B, T, 3 D] -> [B, T, D].

        qkv: q, k and v side by side, each head after head. key_mask: [B, T] bool, True where the
        token is real and may be attended to, or what `prepare_mask` makes of it; none if causal,
        where padding at the end is after all real tokens. rotation: [B, T, 2, D / H / 2] of the
        tokens' positions (`positions.rotary`).
        """
        B, T, _ = qkv.shape
        heads = qkv.view(B, T, 3, self.num_heads, self.head_dim).unbind(2)
        mask = key_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask[:, None, None, :]
        return self._attend(rotate_qk(heads, rotation), mask)

    def _attend(
        self,
        heads: Sequence[Tensor],  # q, k and v, [B, T, H, D / H] each
        mask: Tensor | None = None,  # [B, 1, 1, T]
    ) -> Tensor:  # [B, T, D]
        q, k, v = (x.transpose(1, 2) for x in heads)
        out = F.scaled_dot_product_attention(  # [B, H, T, D / H]
            q, k, v, attn_mask=mask, is_causal=self.causal
        )
        return out.transpose(1, 2).flatten(2)

    def attend_packed(
        self,
        qkv: Tensor,  # [T, 3 D]
        packed: Packed,
        rotation: Tensor | None = None,  # [T, 2, D / H / 2]
    ) -> Tensor:  # [T, D], of the groups' last tokens where they ask for these alone
        """Attend from every token to those of its own sequence.

        In one kernel where `runs_varlen` says so, else in a call for each group of one length.
        """
        heads = qkv.view(1, -1, 3, self.num_heads, self.head_dim).unbind(2)
        turned = rotate_qk(heads, None if rotation is None else rotation[None])
        q, k, v = (x[0] for x in turned)  # [T, H, D / H]
        if packed.ends is not None and not self.causal and runs_varlen(q):
            assert not packed.asks_last
            return varlen_attention(q, k, v, packed.ends, packed.longest).flatten(1)
        of_groups = zip(*(unpack(x, packed.groups) for x in (q, k, v)), strict=True)
        return pack_last([self._attend(group) for group in of_groups], packed.groups)


VARLEN_DTYPES = torch.float16, torch.bfloat16
VARLEN_CAPABILITY = 8, 0  # FlashAttention's


def runs_varlen(q: Tensor) -> bool:  # [T, H, D / H]
    """Return whether `torch.nn.attention.varlen` computes the attention of these queries.

    That is FlashAttention: on a GPU of compute capability 8.0 or newer, in fp16 or bf16, of heads
    of at most 256 features, a multiple of 8. With `vision.attention` = math it is turned off.
    """
    if not q.is_cuda or q.dtype not in VARLEN_DTYPES or not torch.backends.cuda.flash_sdp_enabled():
        return False
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(q.device) >= VARLEN_CAPABILITY


def varlen_attention(
    q: Tensor,  # [T, H, D / H], as k and v
    k: Tensor,
    v: Tensor,
    ends: Tensor,  # [N + 1] int32, of the sequences, from 0
    longest: int,
) -> Tensor:  # [T, H, D / H]
    """Attend by FlashAttention from every token to those of its own sequence."""
    # Here, since it imports torch's compiler, which no start needs.
    from torch.nn.attention.varlen import varlen_attn

    # Torch 2.15 prefers cuDNN, which would build and keep a plan for each new set of lengths.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
    assert isinstance(out, Tensor)
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLayers:
    """Constructors of a block's modules, those of torch or of another library.

    All give one state dict. Every module but `attention` has `reset_parameters()`.
    """

    layernorm_linear: Callable[[int, int, bool, float], nn.Module]  # in, out features, bias, eps
    attention: Callable[[int, int, bool], nn.Module]  # num_heads, head_dim, causal
    linear: Callable[[int, int], nn.Module]  # in_features, out_features
    layernorm_mlp: Callable[[int, int, Mlp, float], nn.Module]  # dim, hidden_dim, activation, eps
    checkpoint: Callable[[Recompute], Checkpoint | None] = torch_checkpoint
    row_multiple: int = 1
    """What the rows of a product, the tokens of all sequences, have to be a multiple of."""


TORCH_LAYERS = BlockLayers(
    layernorm_linear=LayerNormLinear,
    attention=Attention,
    linear=Linear,
    layernorm_mlp=LayerNormMLP,
)


class Block(nn.Module):
    """A pre-norm Transformer block with optional LayerScale and DropPath: [B, T, D] -> [B, T, D].

    x <- x + drop(scale_1 * proj(attention(layernorm_qkv(x))))
    x <- x + drop(scale_2 * layernorm_mlp(x))

    key_bias: with qkv_bias, whether keys have one as well. Without, the bias of queries and values
    is the block's own, since no library's fused layer has one for a part of its outputs. causal:
    each token attends to itself and those before it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        key_bias: bool = True,
        mlp: Mlp = "gelu",
        norm_eps: float = LAYER_NORM_EPS,
        causal: bool = False,
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
        self.layernorm_qkv = layers.layernorm_linear(dim, 3 * dim, qkv_bias and key_bias, norm_eps)
        self.attention = layers.attention(num_heads, dim // num_heads, causal)
        self.proj = layers.linear(dim, dim)
        self.layernorm_mlp = layers.layernorm_mlp(dim, int(dim * mlp_ratio), mlp, norm_eps)
        self.drop_path = DropPath(drop_path, drop_path_mode)
        scaled = layer_scale_init is not None
        self.layer_scale_1 = nn.Parameter(torch.empty(dim)) if scaled else None
        self.layer_scale_2 = nn.Parameter(torch.empty(dim)) if scaled else None
        has_own_bias = qkv_bias and not key_bias
        self.query_value_bias = nn.Parameter(torch.empty(2 * dim)) if has_own_bias else None
        self._reset_own()

    def reset_parameters(self) -> None:
        reset_children(self)
        self._reset_own()

    def _reset_own(self) -> None:
        if self.query_value_bias is not None:
            nn.init.zeros_(self.query_value_bias)
        if self.layer_scale_init is not None:
            for scale in (self.layer_scale_1, self.layer_scale_2):
                assert scale is not None
                nn.init.constant_(scale, self.layer_scale_init)

    def forward(
        self,
        x: Stream,
        key_mask: Tensor | None = None,
        *,
        num_last: int | None = None,
        rotation: Tensor | None = None,
        priority: Tensor | None = None,
        packed: Packed | None = None,
    ) -> Stream:
        """Run the block: [B, T, D] -> [B, T, D], or [B, num_last, D].

        x: a tensor gives a tensor, and a `Residual` a `Residual`, whose last branch the next block
        adds on the way to its first norm, where its layers are ours.
        key_mask: [B, T] bool, True where the token is real; None attends to every token.
        num_last: return the last tokens only, without computing the others.
        rotation: [B, T, 2, D / H / 2] of rotary positions, applied to queries and keys.
        priority: [B, 2] int32 of `DropPath`, for attention and for the MLP.
        packed: x is [T of all, D], sequences of several lengths of which each attends to itself, as
        `pack` makes it; then rotation is [T of all, 2, D / H / 2], priority [N, 2] of the
        sequences, num_last theirs, and key_mask None.
        """
        stream = Residual(x) if isinstance(x, Tensor) else x
        rest = key_mask, num_last, rotation, priority, packed
        if self.checkpoint is None or not torch.is_grad_enabled():
            stream = self._run(stream, *rest)
        else:  # saves its input, which is one tensor
            stream = Residual(self.checkpoint(self._run_whole, stream.total(), *rest))
        if isinstance(x, Tensor):
            return stream.total()
        # another library's layer would add the branch all the same, and later
        return stream if isinstance(self.layernorm_qkv, Normed) else Residual(stream.total())

    def _run_whole(self, x: Tensor, *rest: Any) -> Tensor:
        return self._run(Residual(x), *rest).total()

    def _run_packed(
        self,
        stream: Residual,
        packed: Packed,
        rotation: Tensor | None,
        priority: Tensor | None,
    ) -> Residual:
        """Run the block on sequences of several lengths: products of all, attention of each."""
        first, second = branch_priorities(priority)
        x, qkv = self._qkv(stream)
        attended = self._attend_packed(qkv, packed, rotation)
        if packed.last is not None:
            x, attended = x.index_select(0, packed.last), attended.index_select(0, packed.last)
        elif packed.asks_last:
            x = pack_last(unpack(x, packed.groups), packed.groups)
        drop = self.drop_path
        stream = drop.join_packed(x, self.proj(attended), self.layer_scale_1, packed, first)
        x, branch = add_and_run(self.layernorm_mlp, stream)
        return drop.join_packed(x, branch, self.layer_scale_2, packed, second)

    def _attend_packed(self, qkv: Tensor, packed: Packed, rotation: Tensor | None) -> Tensor:
        if isinstance(self.attention, Attention):
            return self.attention.attend_packed(qkv, packed, rotation)
        assert rotation is None, "another library's attention takes whole batches"
        attended = [self.attention(each, None, None) for each in unpack(qkv, packed.groups)]
        return pack_last(attended, packed.groups)

    def prepare_mask(self, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what all blocks of a stack take as key_mask: [B, T] bool -> as `Attention`'s."""
        prepared: Tensor = self.attention.prepare_mask(key_mask, dtype)  # type: ignore[operator]
        return prepared

    def _run(
        self,
        stream: Residual,
        key_mask: Tensor | None,
        num_last: int | None,
        rotation: Tensor | None,
        priority: Tensor | None,
        packed: Packed | None,
    ) -> Residual:
        if packed is not None:
            return self._run_packed(stream, packed, rotation, priority)
        drop, (first, second) = self.drop_path, branch_priorities(priority)
        rows = drop.draw(stream.x, first)
        key_mask = None if key_mask is None else take_rows(key_mask, rows)
        rotation = None if rotation is None else take_rows(rotation, rows)
        x, qkv = self._qkv(stream, rows)
        attended = self.attention(qkv, key_mask, rotation)
        if num_last is not None:
            start = x.shape[1] - num_last
            x, attended = x[:, start:].contiguous(), attended[:, start:]
        stream = drop.join(x, self.proj(attended), self.layer_scale_1, rows, first)
        rows = drop.draw(x, second)
        x, branch = add_and_run(self.layernorm_mlp, stream, rows)
        return drop.join(x, branch, self.layer_scale_2, rows, second)

    def _qkv(
        self, stream: Residual, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # [B, T, D] -> [B, T, D], [B or kept, T, 3 D]
        x, qkv = add_and_run(self.layernorm_qkv, stream, rows)
        if self.query_value_bias is None:
            return x, qkv
        query, value = self.query_value_bias.to(qkv.dtype).chunk(2)
        return x, qkv + torch.cat([query, torch.zeros_like(query), value])
