"""Sizes of the text Transformer that encodes captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from m3i_fast.config.fields import (
    DEPTHS,
    SOME_ROWS,
    WIDTHS,
    Checked,
    Conflict,
    Gelu,
    Recompute,
    mlp_ratio_conflicts,
    unmet,
)

Attention = Literal["bidirectional", "causal"]


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
    attention: Attention = "bidirectional"
    """Tokens that a token attends to. bidirectional: all of the caption, whose mean is projected
    (M3I, figure 1); causal: itself and those before it, and the last one is projected, as CLIP, of
    which open_clip reads and writes the weights."""
    mlp: Gelu = "gelu"
    """Activation of the MLPs. gelu: exact; gelu_tanh: its tanh approximation; quick_gelu:
    x sigmoid(1.702 x), as OpenAI's CLIP."""
    norm_eps: float = 1e-6
    """Number that every LayerNorm adds to the variance (CLIP: 1e-5)."""
    activation_checkpointing: Recompute = "none"
    """Activations that each block recomputes in the backward pass. selective: norms and GELU, which
    costs little; full: all of it, the least memory for about a third more compute."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.dim % self.num_heads:
            yield "dim", f"expected a multiple of num_heads = {self.num_heads}, got {self.dim}"
        yield from unmet(self, norm_eps=(0 < self.norm_eps < 1, "0 < eps < 1"))
        yield from mlp_ratio_conflicts(self.mlp_ratio)
