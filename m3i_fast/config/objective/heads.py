"""Sizes of the predictors: the dense decoder, the captioner and the projectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from m3i_fast.config.fields import (
    DEPTHS,
    WIDTHS,
    Checked,
    Conflict,
    Recompute,
    mlp_ratio_conflicts,
    unmet,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig(Checked):
    """Size the dense decoder."""

    dim: Annotated[int, WIDTHS] = 512
    """Width of a token."""
    depth: Annotated[int, DEPTHS] = 4
    """Number of blocks."""
    num_heads: Annotated[int, WIDTHS] = 16
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over dim."""
    projector: Literal["none", "mlp", "batch_norm"] = "none"
    """Projector between the encoder's cells and the decoder, with an EMA copy between the EMA
    encoder's cells and the targets, so that labels and dense targets do not share one output. mlp:
    two layers of width dim; batch_norm: the same with batch norm, whose statistics are those of all
    rows of a step, as SiameseIM's."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.dim % self.num_heads:
            yield "dim", f"expected a multiple of num_heads = {self.num_heads}, got {self.dim}"
        if self.dim % 4:
            yield "dim", f"expected a multiple of 4 (sine-cosine), got {self.dim}"
        yield from mlp_ratio_conflicts(self.mlp_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionerConfig(Checked):
    """Size the text decoder that writes captions from an image's cells."""

    dim: Annotated[int, WIDTHS] = 512
    """Width of a token."""
    depth: Annotated[int, DEPTHS] = 6
    """Number of blocks, each of which attends to the caption's tokens and to the cells."""
    num_heads: Annotated[int, WIDTHS] = 8
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over dim."""
    parallel: float = 0.0
    """Share of the captions that are predicted from the image alone: the decoder reads a mask in
    the place of every token, and a token attends to those after it too (CapPa: 0.75). Which ones,
    is drawn by the position of each sample."""
    coordinate_bins: Annotated[int, WIDTHS] = 500
    """Equal parts of a view's side, a token each, that a coordinate of a region's box is one of:
    with 500 less than a pixel of a view of 224 to 448."""
    activation_checkpointing: Recompute = "none"
    """Activations that each block recomputes in the backward pass, as text's."""

    def place(self) -> str:
        return "captioner."

    def conflicts(self) -> Iterator[Conflict]:
        if self.dim % self.num_heads:
            yield "dim", f"expected a multiple of num_heads = {self.num_heads}, got {self.dim}"
        yield from unmet(self, parallel=(0 <= self.parallel <= 1, "in [0, 1]"))
        yield from mlp_ratio_conflicts(self.mlp_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig(Checked):
    """Size the MLPs between the encoder and the embeddings that are compared."""

    hidden_dim: Annotated[int, WIDTHS] = 2048
    """Width of the hidden layers."""
    output_dim: Annotated[int, WIDTHS] = 256
    """Width of an embedding."""
    num_layers: Annotated[int, DEPTHS] = 3
    """Linear layers of the projector."""
    predictor_hidden_dim: Annotated[int, WIDTHS] = 512
    """Width of the hidden layer of the predictor on top of it."""

    def place(self) -> str:
        return "projector."
