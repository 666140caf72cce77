"""The Transformer block in torch, with Transformer Engine's parameter names.

Legend: B batch, T tokens, D width, H heads, F hidden width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.fields import DropPathMode, Mlp, Recompute
from m3i_fast.models.activation_checkpointing import Checkpoint, torch_checkpoint
from m3i_fast.models.transformer.positions import rotate
from m3i_fast.ops.add_layer_norm import MAX_WIDTH, add_layer_norm

LAYER_NORM_EPS = 1e-6  # timm, MAE and DINO; Transformer Engine's own default is 1e-5
INIT_STD = 0.02
QUICK_GELU = 1.702  # OpenAI's CLIP
MASK_ALIGNMENT = 16  # elements, of the rows of a mask for torch's memory-efficient attention

# (x [..., K], weight [N, K], bias [N] or None) -> [..., N], as F.linear
Matmul = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def init_weight(weight: Tensor) -> None:
    """Draw a weight from a truncated normal of standard deviation 0.02, as timm does for ViTs."""
    nn.init.trunc_normal_(weight, std=INIT_STD)


def reset_children(module: nn.Module, *, but: Collection[nn.Module] = ()) -> None:
    """Initialise all children of `module` again, in the order of construction, except `but`."""
    for child in module.children():
        if child not in but:
            reset(child, but=but)


def reset(module: nn.Module, *, but: Collection[nn.Module] = ()) -> None:
    """Initialise `module` again by its `reset_parameters`, or else by those of its children."""
    own = getattr(module, "reset_parameters", None)
    if own is None:
        reset_children(module, but=but)
    else:
        own()


class Linear(nn.Linear):
    """A linear layer with a ViT's initialisation: weight [out, in], bias [out]."""

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


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a product of `x` is computed: that of autocast where it is on."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class Residual(NamedTuple):
    """The residual stream of a stack of blocks, whose last branch is still to be added."""

    x: Tensor  # [..., D]
    branch: Tensor | None = None  # [..., D]

    def total(self) -> Tensor:
        """Return x + branch."""
        return self.x if self.branch is None else self.x + self.branch


Stream = TypeVar("Stream", Tensor, Residual)


class Normed(nn.Module):
    """A module that begins with a LayerNorm, and can add a branch on the way to it."""

    layer_norm_weight: nn.Parameter  # [in_features]
    layer_norm_bias: nn.Parameter  # [in_features]
    eps: float

    def norm(self, stream: Residual) -> tuple[Tensor, Tensor]:
        """Return the sum of the stream, and its norm in the dtype of the products after it."""
        x, branch = stream
        weight, bias = self.layer_norm_weight, self.layer_norm_bias
        dtype = product_dtype(x)
        if branch is not None and branch.dtype != dtype:
            x, branch = x + branch, None
        if len(weight) <= MAX_WIDTH:
            return add_layer_norm(x, branch, weight, bias, eps=self.eps, dtype=dtype)
        x = Residual(x, branch).total()
        return x, F.layer_norm(x, weight.shape, weight, bias, self.eps)

    def products(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        """Compute what follows the norm."""
        raise NotImplementedError

    def forward(self, x: Tensor | Residual) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the layer: [..., in_features] -> [..., out_features].

        Of a `Residual` return its sum as well, which comes first.
        """
        if isinstance(x, Tensor):
            return self.products(self.norm(Residual(x))[1])
        total, normed = self.norm(x)
        return total, self.products(normed)


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


class LayerNormLinear(Normed):
    """A LayerNorm and a linear layer: [..., in_features] -> [..., out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        eps: float = LAYER_NORM_EPS,
        *,
        matmul: Matmul = F.linear,
    ) -> None:
        super().__init__()
        self.eps, self.matmul = eps, matmul
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

    def products(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)


def fc1_features(hidden_dim: int, activation: Mlp) -> int:
    """Return how many features an MLP's first layer computes: twice as many with a gate."""
    return hidden_dim * (2 if activation == "swiglu" else 1)


def activate(x: Tensor, activation: Mlp) -> Tensor:  # [..., F or 2 F] -> [..., F]
    """Apply an MLP's activation to what its first layer computes.

    quick_gelu: x sigmoid(1.702 x), as CLIP. swiglu: silu(gate) * value, the gate first.
    """
    match activation:
        case "swiglu":
            gate, value = x.chunk(2, dim=-1)
            return F.silu(gate) * value
        case "quick_gelu":
            return x * torch.sigmoid(QUICK_GELU * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class LayerNormMLP(Normed):
    """A LayerNorm and an MLP of two linear layers: [..., dim] -> [..., dim].

    gelu: fc2(gelu(fc1(x))), exact, and likewise with the other GELUs of `activate`. swiglu (arXiv
    2002.05202): fc2(silu(gate) * value), where fc1 computes the gate, F features, and then the
    value, as many.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Mlp = "gelu",
        eps: float = LAYER_NORM_EPS,
        *,
        matmul: Matmul = F.linear,
    ) -> None:
        super().__init__()
        self.activation, self.eps, self.matmul = activation, eps, matmul
        fc1_dim = fc1_features(hidden_dim, activation)
        self.layer_norm_weight = nn.Parameter(torch.empty(dim))
        self.layer_norm_bias = nn.Parameter(torch.empty(dim))
        self.fc1_weight = nn.Parameter(torch.empty(fc1_dim, dim))
        self.fc1_bias = nn.Parameter(torch.empty(fc1_dim))
        self.fc2_weight = nn.Parameter(torch.empty(dim, hidden_dim))
        self.fc2_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.layer_norm_weight)
        init_weight(self.fc1_weight)
        init_weight(self.fc2_weight)
        for bias in (self.layer_norm_bias, self.fc1_bias, self.fc2_bias):
            nn.init.zeros_(bias)

    def products(self, x: Tensor) -> Tensor:
        x = activate(self.matmul(x, self.fc1_weight, self.fc1_bias), self.activation)
        return self.matmul(x, self.fc2_weight, self.fc2_bias)


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
        q, k, v = (x.transpose(1, 2) for x in rotate_qk(heads, rotation))
        mask = key_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask[:, None, None, :]
        out = F.scaled_dot_product_attention(  # [B, H, T, D / H]
            q, k, v, attn_mask=mask, is_causal=self.causal
        )
        return out.transpose(1, 2).flatten(2)


def num_kept(num_samples: int, rate: float) -> int:
    """Count the samples that a branch keeps with stochastic depth by subset, at least one."""
    return max(1, round(num_samples * (1 - rate)))


NUM_PRIORITIES = 2**24


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): a residual branch is dropped for whole samples.

    In training only. mask: each sample is dropped by its own draw, after the branch is computed;
    the kept ones are scaled by 1 / (1 - rate). subset (DINOv2): a fixed share of each batch is
    dropped before the branch, which is computed for the kept samples only; these are scaled by B
    over their number.

    priority: [B] int32, uniform in [0, 2**24), by which samples are dropped: those below the rate,
    or with subset the lowest of the batch. A training step draws them by the samples'
    positions in the run; None draws from torch's global generator.
    """

    def __init__(self, rate: float, mode: DropPathMode = "mask") -> None:
        super().__init__()
        self.rate, self.mode = rate, mode

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}, mode={self.mode}"

    def forward(
        self,
        branch: Tensor,  # [B, ...]
        priority: Tensor | None = None,  # [B] int32
    ) -> Tensor:  # [B, ...]
        """Return the branch with dropped samples zeroed and kept ones scaled, in mode mask."""
        if not self.training or self.rate == 0.0 or self.mode == "subset":
            return branch
        keep = 1.0 - self.rate
        one_a_sample = (branch.shape[0], *(1,) * (branch.ndim - 1))
        if priority is None:
            kept = branch.new_empty(one_a_sample).bernoulli_(keep)
        else:
            kept = (priority >= round(self.rate * NUM_PRIORITIES)).to(branch.dtype)
        return branch * kept.view(one_a_sample).div_(keep)

    def draw(self, x: Tensor, priority: Tensor | None = None) -> Tensor | None:
        """Draw the samples of x [B, ...] that go through the branch: [kept] int64, None for all."""
        if not self.training or self.rate == 0.0 or self.mode == "mask":
            return None
        if priority is None:
            order = torch.randperm(len(x), device=x.device)
        else:
            order = priority.argsort(stable=True, descending=True)
        return order[: num_kept(len(x), self.rate)]

    def join(
        self,
        x: Tensor,  # [B, ...]
        branch: Tensor,  # [B or kept, ...]
        scale: Tensor | None,
        rows: Tensor | None = None,  # [kept] int64
        priority: Tensor | None = None,  # [B] int32
    ) -> Residual:  # [B, ...]
        """Return x + scale * branch, the branch still to be added where nothing scales it.

        rows: the samples of x that the branch has, None for all.
        """
        if rows is not None:
            branch = branch if scale is None else branch * scale
            added = x.index_add(0, rows, branch.to(x.dtype), alpha=len(x) / len(rows))
            return Residual(added)
        branch = self(branch, priority)
        # one pass instead of two over the branch
        return Residual(x, branch) if scale is None else Residual(torch.addcmul(x, branch, scale))

    def add(
        self,
        x: Tensor,  # [B, ...]
        branch: Tensor,  # [B or kept, ...]
        scale: Tensor | None,
        rows: Tensor | None,  # [kept] int64
        priority: Tensor | None = None,  # [B] int32
    ) -> Tensor:  # [B, ...]
        """Return x + scale * branch, as `join`."""
        return self.join(x, branch, scale, rows, priority).total()


def branch_priorities(
    priority: Tensor | None,  # [B, 2] int32
) -> tuple[Tensor | None, Tensor | None]:
    """Return the priorities of a layer's first and second branch, [B] each, or none."""
    return (None, None) if priority is None else (priority[:, 0], priority[:, 1])


def layer_priorities(
    priority: Tensor | None,  # [B, 2 L] int32
    layer: int,
) -> Tensor | None:
    """Return the priorities of a layer's two branches, [B, 2], or none."""
    return None if priority is None else priority[:, 2 * layer : 2 * layer + 2]


def take_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Select rows [kept] int64 of x [B, ...]; None returns x itself."""
    return x if rows is None else x[rows]


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


TORCH_LAYERS = BlockLayers(
    layernorm_linear=LayerNormLinear,
    attention=Attention,
    linear=Linear,
    layernorm_mlp=LayerNormMLP,
)


class Sequences(NamedTuple):
    """Size of a batch among several that are packed."""

    batch_size: int
    length: int
    num_last: int | None = None
    """Tokens that a block returns, the last ones of each sequence; None for all."""

    @property
    def start(self) -> int:
        """Return the first token that a block returns."""
        return 0 if self.num_last is None else self.length - self.num_last


def pack(batches: Sequence[Tensor]) -> Tensor:  # [B, T, D] each -> [B T of all, D]
    """Put batches of sequences of several lengths behind one another."""
    return torch.cat([batch.flatten(0, 1) for batch in batches])


def unpack(tokens: Tensor, packed: Sequence[Sequences]) -> list[Tensor]:
    """Undo `pack`: [B T of all, D] -> [B, T, D] each, views."""
    parts = tokens.split([of.batch_size * of.length for of in packed])
    return [part.view(of.batch_size, of.length, -1) for part, of in zip(parts, packed, strict=True)]


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
        packed: Sequence[Sequences] = (),
    ) -> Stream:
        """Run the block: [B, T, D] -> [B, T, D], or [B, num_last, D].

        x: a tensor gives a tensor, and a `Residual` a `Residual`, whose last branch the next block
        adds on the way to its first norm, where its layers are ours.
        key_mask: [B, T] bool, True where the token is real; None attends to every token.
        num_last: return the last tokens only, without computing the others.
        rotation: [B, T, 2, D / H / 2] of rotary positions, applied to queries and keys.
        priority: [B, 2] int32 of `DropPath`, for attention and for the MLP.
        packed: x is [B T of all, D], sequences of several lengths of which each attends to itself,
        as `pack` makes it; then num_last is theirs, and key_mask, rotation and priority are None.
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

    def _run_packed(self, stream: Residual, packed: Sequence[Sequences]) -> Residual:
        """Run the block on sequences of several lengths: products of all, attention of each."""
        assert not self.training or self.drop_path.rate == 0.0, "a row of x is no sample"
        x, qkv = self._qkv(stream)
        attended = [self.attention(each, None, None) for each in unpack(qkv, packed)]
        if any(of.num_last is not None for of in packed):
            attended = [a[:, of.start :] for a, of in zip(attended, packed, strict=True)]
            last = zip(unpack(x, packed), packed, strict=True)
            x = pack([tokens[:, of.start :] for tokens, of in last])
        join = self.drop_path.join
        stream = join(x, self.proj(pack(attended)), self.layer_scale_1)
        x, branch = add_and_run(self.layernorm_mlp, stream)
        return join(x, branch, self.layer_scale_2)

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
        packed: Sequence[Sequences],
    ) -> Residual:
        if packed:
            return self._run_packed(stream, packed)
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
