"""What the objective asks of an image encoder, whatever it is made of.

Letters: B images, N cells of the grid, n cells of one image in an input, C width of a token, s
tokens of a summary, P their width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class ImageEncoder(nn.Module, ABC):
    """A network from images to a square grid of tokens, read row by row, and to a summary."""

    @abstractmethod
    def encode_cells(self, images: Tensor) -> Tensor:
        """Tokens of every cell, and of nothing else: [B, 3, H, W] -> [B, N, C]."""

    @abstractmethod
    def summarise(self, tokens: Tensor) -> Tensor:
        """Tokens whose mean speaks for the image, from any of its cells: [B, n, C] -> [B, s, P]."""
