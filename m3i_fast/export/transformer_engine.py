"""Vision Transformers from and to blocks of Transformer Engine's TransformerLayer, bit for bit.

Its `self_attention` contains what our block contains itself, and by default
(`qkv_weight_interleaved`) it orders the rows of queries, keys and values head by head, where timm
and we put all queries first. Our own body of its modules needs no conversion: it has our names and
our order.

Letters: H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.models.transformer.vit import ViT

_OURS_TO_TE = {
    "layernorm_qkv.": "self_attention.layernorm_qkv.",
    "proj.": "self_attention.proj.",
    "layernorm_mlp.": "layernorm_mlp.",
}


def interleave_qkv(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder rows [3 D, ...] from (q; k; v) with heads inside to heads with (q; k; v) inside."""
    return rows.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def deinterleave_qkv(rows: Tensor, num_heads: int) -> Tensor:
    """Reorder rows [3 D, ...] from heads with (q; k; v) inside to (q; k; v) with heads inside."""
    return rows.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def to_transformer_layers(vit: ViT, *, interleaved: bool = True) -> dict[str, Tensor]:
    """Return copies of the weights under the names of TransformerLayer.

    A name is `blocks.0.self_attention.proj.weight`; weights outside the blocks keep their name.
    interleaved: TransformerLayer's `qkv_weight_interleaved`. The layers need layernorm_epsilon as
    norm_eps, activation as mlp, self_attn_mask_type no_mask, attn_input_format bshd and no dropout.
    Raises ValueError for LayerScale and for a bias of queries and values alone, which they lack.
    """
    _expect_theirs(vit.cfg)
    order = _order(interleave_qkv, vit.cfg, interleaved)
    return {
        _renamed(name, _OURS_TO_TE): order(name, value).clone()
        for name, value in vit.state_dict().items()
    }


def from_transformer_layers(
    state: Mapping[str, Tensor], cfg: ViTConfig, *, interleaved: bool = True
) -> ViT:
    """Return a ViT from the weights of `to_transformer_layers`; `_extra_state` is ignored.

    Raises ValueError naming the parameters that are missing, unexpected or of another shape.
    """
    _expect_theirs(cfg)
    order = _order(deinterleave_qkv, cfg, interleaved)
    te_to_ours = {theirs: ours for ours, theirs in _OURS_TO_TE.items()}
    weights = {
        _renamed(name, te_to_ours): value
        for name, value in state.items()
        if not name.endswith("._extra_state")
    }
    vit = ViT(cfg)
    expected = vit.state_dict()
    problems = [f"missing: {name}" for name in expected if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in expected]
    problems += [
        f"{name}: expected {list(value.shape)}, got {list(weights[name].shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise ValueError(
            "TransformerLayer weights do not fit this ViTConfig; " + "; ".join(problems)
        )
    vit.load_state_dict({name: order(name, value) for name, value in weights.items()})
    return vit


def _expect_theirs(cfg: ViTConfig) -> None:
    if cfg.layer_scale_init is not None:
        raise ValueError(
            "layer_scale_init: expected none with Transformer Engine's TransformerLayer, which has "
            f"no LayerScale, got {cfg.layer_scale_init}; set layer_scale_init = None"
        )
    if cfg.qkv_bias and not cfg.key_bias:
        raise ValueError(
            "key_bias: expected True with Transformer Engine's TransformerLayer, which has no bias "
            "of queries and values alone, got False"
        )


def _order(
    permute: Callable[[Tensor, int], Tensor], cfg: ViTConfig, interleaved: bool
) -> Callable[[str, Tensor], Tensor]:
    """Return a function that permutes the query, key and value projections alone, by name."""
    projections = ("layernorm_qkv.weight", "layernorm_qkv.bias")

    def order(name: str, value: Tensor) -> Tensor:
        moved = interleaved and name.endswith(projections)
        return permute(value, cfg.num_heads) if moved else value

    return order


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Return the name of a block's weight under the other side's prefix; other names unchanged."""
    if not name.startswith("blocks."):
        return name
    _, index, rest = name.split(".", 2)
    for before, after in prefixes.items():
        if rest.startswith(before):
            return f"blocks.{index}.{after}{rest.removeprefix(before)}"
    return name
