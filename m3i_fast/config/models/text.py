"""Sizes of the text Transformer that encodes captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from m3i_fast.config.fields import (
    DEPTHS,
    SOME_ROWS,
    WIDTHS,
    Checked,
    Conflict,
    Recompute,
    mlp_ratio_conflicts,
    recompute_conflicts,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(Checked):
    """Size the text Transformer; the defaults are CLIP's base size."""

    vocab_size: Annotated[int, SOME_ROWS] = 49408
    """Number of token ids (CLIP's byte-pair encoding). Training takes it from the data's
    manifest."""
    context_length: Annotated[int, WIDTHS] = 77
    """Most tokens of a caption. Training takes it from the data's manifest."""
    dim: Annotated[int, WIDTHS] = 512
    """Width of a token."""
    depth: Annotated[int, DEPTHS] = 12
    """Number of blocks."""
    num_heads: Annotated[int, WIDTHS] = 8
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over dim."""
    embed_dim: Annotated[int, WIDTHS] = 512
    """Width of a caption's embedding."""
    activation_checkpointing: Recompute = "none"
    """Activations that each block recomputes in the backward pass. selective: norms and GELU, which
    costs little; full: all of it, the least memory for about a third more compute."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.dim % self.num_heads:
            yield "dim", f"expected a multiple of num_heads = {self.num_heads}, got {self.dim}"
        yield from mlp_ratio_conflicts(self.mlp_ratio)
        yield from recompute_conflicts(self.activation_checkpointing)
