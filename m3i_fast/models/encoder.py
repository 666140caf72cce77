"""The interface that the objective needs of an image encoder.

Legend: B images, N cells of the token grid, n cells that one image shows, C width of a token, s
tokens of a summary, P their width; in `take_cells` P inputs and I images in them; of pictures of
any size P pictures, T patches of all of them, R prefix tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class PackedTokens(NamedTuple):
    """The encoded tokens of pictures of several sizes, in the order of the pictures."""

    prefix: Tensor  # [P, R, C]: class token and registers
    cells: Tensor  # [T, C], those of a picture row by row


class PackedCells(NamedTuple):
    """The cells of pictures of any sizes that an encoder is given, sequence after sequence.

    The tokens of a sequence attend to one another alone: those of a picture, or of some that share
    an input. Each cell's position is that in its own picture.
    """

    lengths: Sequence[int]
    """Cells of each sequence, T in all."""
    place: Tensor  # [T, 2] int64: row and column of each cell
    extent: Tensor  # [T, 2] int64: rows and columns of its picture
    largest: int
    """The most rows or columns of a picture, known on the host."""
    hidden: Tensor | None = None  # [T] bool: cells that are embedded as a mask token


class ImageEncoder(nn.Module, ABC):
    """A network that encodes images as a square grid of tokens, row by row, and as a summary."""

    dim: int
    """Width C of a token."""
    summary_dim: int
    """Width P of a summary's tokens."""

    @abstractmethod
    def encode_cells(self, images: Tensor) -> Tensor:
        """Encode images as one token a cell, and no other token: [B, 3, H, W] -> [B, N, C]."""

    @abstractmethod
    def summarise(self, tokens: Tensor) -> Tensor:
        """Summarise any cells of an image as tokens to average: [B, n, C] -> [B, s, P]."""

    def encode_pictures(
        self,
        patches: Tensor,  # [T, 3 P P]
        grids: Tensor,  # [P, 2] int64
        priority: Tensor | None = None,  # [P, 2 depth] int32
    ) -> PackedTokens:
        """Encode whole pictures of any sizes; ValueError where the encoder needs whole batches."""
        raise self._needs_whole_batches()

    def encode_patches(
        self,
        patches: Tensor,  # [T, 3 P P]
        cells: PackedCells,
        priority: Tensor | None = None,  # [sequences, 2 depth] int32
        mask_token: Tensor | None = None,  # [C]
    ) -> PackedTokens:
        """Encode cells of pictures of any sizes; ValueError where it needs whole batches."""
        raise self._needs_whole_batches()

    def _needs_whole_batches(self) -> ValueError:
        return ValueError(
            "vision: expected a ViT for packed pictures, whose tokens know no neighbours, got "
            f"{type(self).__name__}"
        )

    def layers_above(self, parameter: str) -> int:
        """Count the layers above that of a parameter, the exponent of its layer-wise decay.

        parameter: its name in `named_parameters` of this encoder. Raises ValueError for an encoder
        whose layers have no order, such as a teacher's.
        """
        raise ValueError(
            f"optim.layer_decay: expected 1 for {type(self).__name__}, whose layers have no order"
        )


def take_cells(tokens: Tensor, token_index: Tensor) -> Tensor:
    """Gather each image's own cells of the input it is in: [P, N, C], [I, n] int64 -> [I, n, C].

    Image i is in input i % P.
    """
    num_inputs, num_cells, dim = tokens.shape
    row = torch.arange(token_index.shape[0], device=tokens.device) % num_inputs
    flat = (row[:, None] * num_cells + token_index).flatten()
    return tokens.flatten(0, 1).index_select(0, flat).view(*token_index.shape, dim)
