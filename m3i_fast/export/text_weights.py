"""Weights of a text Transformer as CLIP's, causal and read at its end, for our text encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.models.text import TextConfig
from m3i_fast.export.vit_names import Renamed
from m3i_fast.export.vit_weights import FittedWeights, flag
from m3i_fast.models.transformer.text_encoder import TextEncoder

NUM_SPECIAL = 2  # tokens at the end of the vocabulary: start and end


def fitted_text(named: Renamed, told: Mapping[str, Any], cfg: TextConfig) -> FittedWeights:
    """Return the weights of a text tower, by our names, for a text encoder of `cfg`.

    told: fields of a TextConfig that shapes do not tell. Of a smaller vocabulary, which has the
    first of CLIP's merges, the tokens that it has are taken, of fewer positions the first. Raises
    ValueError where `cfg` is another network, with the flags, and for a smaller one.
    """
    tensors = named.tensors
    _expect_same(told, tensors, cfg)
    changes = {}
    vocab_size, length = len(tensors["token_embedding.weight"]), tensors["pos_embed"].shape[1]
    if cfg.vocab_size < vocab_size:
        table, kept = tensors["token_embedding.weight"], cfg.vocab_size - NUM_SPECIAL
        tensors["token_embedding.weight"] = torch.cat([table[:kept], table[-NUM_SPECIAL:]])
        changes["token_embedding.weight"] = (
            f"the first {kept} of {vocab_size} tokens, start and end"
        )
    if cfg.context_length < length:
        tensors["pos_embed"] = tensors["pos_embed"][:, : cfg.context_length].clone()
        changes["pos_embed"] = f"the first {cfg.context_length} of {length} positions"
    with torch.device("meta"):
        expected = TextEncoder(cfg).state_dict()
    wrong = [
        f"{name}: expected {list(value.shape)}, got "
        f"{list(tensors[name].shape) if name in tensors else 'none'}"
        for name, value in expected.items()
        if name not in tensors or tensors[name].shape != value.shape
    ]
    wrong += [
        f"{named.sources.get(name, name)}: expected none, got {list(value.shape)}"
        for name, value in tensors.items()
        if name not in expected
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return FittedWeights(
        tensors={name: tensors[name] for name in expected},
        sources=named.sources,
        changes=changes,
        left_out=named.left_out,
    )


def _expect_same(told: Mapping[str, Any], tensors: Mapping[str, Tensor], cfg: TextConfig) -> None:
    """Raise ValueError where `cfg` is another network than the file's, with the flags of that."""
    wrong = list(_differing(told, tensors, cfg))
    if wrong:
        expected = ", ".join(f"{name} {getattr(cfg, name)}" for name, _ in wrong)
        got = ", ".join(f"{name} {value}" for name, value in wrong)
        flags = " ".join(flag("text", name, value) for name, value in wrong)
        raise ValueError(f"expected a text tower of {expected}, got one of {got}: add {flags}")
    own = len(tensors["token_embedding.weight"]), tensors["pos_embed"].shape[1]
    if cfg.vocab_size > own[0] or cfg.context_length > own[1]:
        raise ValueError(
            f"expected {cfg.vocab_size} tokens and {cfg.context_length} positions, those of the "
            f"data, got {own[0]} and {own[1]}: pack the data with at most as many"
        )


def _differing(
    told: Mapping[str, Any], tensors: Mapping[str, Tensor], cfg: TextConfig
) -> Iterator[tuple[str, object]]:
    """Yield the fields that a file has otherwise than `cfg`, with the file's value."""
    hidden, width = tensors["blocks.0.layernorm_mlp.fc1_weight"].shape
    found: dict[str, Any] = {
        "dim": width,
        "depth": 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        "embed_dim": len(tensors["projection.weight"]),
        "attention": "causal",
        **told,
    }
    if hidden != int(cfg.dim * cfg.mlp_ratio) or width != cfg.dim:
        if hidden / width != cfg.mlp_ratio:
            found["mlp_ratio"] = hidden / width
    yield from ((name, value) for name, value in found.items() if getattr(cfg, name) != value)
