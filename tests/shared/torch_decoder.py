"""torch.nn.TransformerDecoder with the weights of our captions' decoder, which both learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from m3i_fast.models.transformer.decoder_block import DecoderBlock
from m3i_fast.models.transformer.text_decoder import TextDecoder


def torch_decoder(decoder: TextDecoder, cells: Tensor, x: Tensor, *, causal: bool) -> Tensor:
    """What torch's layers make of embedded tokens: [B, n, C], [B, T, D] -> [B, T, D]."""
    cfg, width = decoder.cfg, cells.shape[-1]
    layer = nn.TransformerDecoderLayer(
        cfg.dim,
        cfg.num_heads,
        int(cfg.dim * cfg.mlp_ratio),
        dropout=0.0,
        activation=F.gelu,
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    )
    if width != cfg.dim:
        layer.multihead_attn = nn.MultiheadAttention(
            cfg.dim, cfg.num_heads, kdim=width, vdim=width, batch_first=True
        )
    layers = nn.TransformerDecoder(layer, cfg.depth, nn.LayerNorm(cfg.dim, 1e-6)).to(x.dtype)
    weights = {"norm.weight": decoder.norm.weight, "norm.bias": decoder.norm.bias}
    for number, block in enumerate(decoder.blocks):
        assert isinstance(block, DecoderBlock)
        own = _weights(block)
        if width == cfg.dim:  # torch keeps the three in one matrix then
            parts = [own.pop(f"multihead_attn.{name}_proj_weight") for name in "qkv"]
            own["multihead_attn.in_proj_weight"] = torch.cat(parts)
        weights |= {f"layers.{number}.{name}": value for name, value in own.items()}
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    return functional_call(layers, weights, (x, cells), {"tgt_mask": hidden}, strict=False)


def _weights(block: DecoderBlock) -> dict[str, Tensor]:
    qkv, query, mlp = block.layernorm_qkv, block.layernorm_query, block.layernorm_mlp
    key, value = block.key_value.weight.chunk(2)
    return {
        "self_attn.in_proj_weight": qkv.weight,
        "self_attn.in_proj_bias": qkv.bias,
        "self_attn.out_proj.weight": block.proj.weight,
        "self_attn.out_proj.bias": block.proj.bias,
        "multihead_attn.q_proj_weight": query.weight,
        "multihead_attn.k_proj_weight": key,
        "multihead_attn.v_proj_weight": value,
        "multihead_attn.in_proj_bias": torch.cat([query.bias, block.key_value.bias]),
        "multihead_attn.out_proj.weight": block.inter_proj.weight,
        "multihead_attn.out_proj.bias": block.inter_proj.bias,
        "linear1.weight": mlp.fc1_weight,
        "linear1.bias": mlp.fc1_bias,
        "linear2.weight": mlp.fc2_weight,
        "linear2.bias": mlp.fc2_bias,
        **{
            f"norm{number}.{name}": getattr(module, f"layer_norm_{name}")
            for number, module in enumerate((qkv, query, mlp), start=1)
            for name in ("weight", "bias")
        },
    }


def hidden_of(
    decoder: TextDecoder, cells: Tensor, token_ids: Tensor, parallel: Tensor | None = None
) -> Tensor:
    """What `TextDecoder` computes, a caption at a time: [B, n, C], [B, T] -> [B, T - 1, D]."""
    place, rows = decoder.pos_embed[0, : token_ids.shape[1] - 1], []
    for row, ids in enumerate(token_ids):
        alone = parallel is not None and bool(parallel[row])
        read = F.embedding(ids[:-1].long(), decoder.token_embedding.weight)
        x = decoder.mask_token.expand_as(read) if alone else read
        rows.append(torch_decoder(decoder, cells[row, None], (x + place)[None], causal=not alone))
    return torch.cat(rows)
