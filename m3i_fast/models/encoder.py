"""What the objective asks of an image encoder, whatever it is made of.

Letters: B images, N cells of the grid, n cells of one image in an input, C width of a token, s
tokens of a summary, P their width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class ImageEncoder(nn.Module, ABC):
    """A network from images to a square grid of tokens, read row by row, and to a summary."""

    dim: int
    """Width of a token."""
    summary_dim: int
    """Width of a summary's tokens."""

    @abstractmethod
    def encode_cells(self, images: Tensor) -> Tensor:
        """Tokens of every cell, and of nothing else: [B, 3, H, W] -> [B, N, C]."""

    @abstractmethod
    def summarise(self, tokens: Tensor) -> Tensor:
        """Tokens whose mean speaks for the image, from any of its cells: [B, n, C] -> [B, s, P]."""

    def layers_above(self, parameter: str) -> int:
        """How many layers stand above that of `parameter`, named as here: layer decay's power.

        Raises ValueError for an encoder whose layers have no order, such as a teacher's.
        """
        raise ValueError(
            f"optim.layer_decay: expected 1 for {type(self).__name__}, whose layers have no order"
        )


def take_cells(tokens: Tensor, token_index: Tensor) -> Tensor:
    """Each image's own cells of the input that it is in: [P, N, C], [I, n] int64 -> [I, n, C].

    Image i is in input i % P.
    """
    num_inputs, num_cells, dim = tokens.shape
    row = torch.arange(token_index.shape[0], device=tokens.device) % num_inputs
    flat = (row[:, None] * num_cells + token_index).flatten()
    return tokens.flatten(0, 1).index_select(0, flat).view(*token_index.shape, dim)
