"""What evaluation asks of any encoder: features of pictures, embeddings, a digest of its weights.

Legend: B pictures or texts, S side in pixels, R prefix tokens, N patches, C width, E embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

    from m3i_fast.models.encoder import ImageEncoder

NUM_LAYERS = 4
"""Last blocks whose tokens are kept, as DINOv2's linear evaluation does (arXiv 2304.07193)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchTokens:
    """The tokens that an encoder makes of square pictures, a square grid of them row by row."""

    encode: Callable[[Tensor], Tensor]
    """Normalised pictures [B, 3, S, S] -> tokens [B, R + N, C] fp32, after the final norm."""
    normalise: Callable[[Tensor], Tensor]
    """[B, 3, S, S] uint8 -> the same pictures as the encoder takes them, nothing cut or resized."""
    num_prefix: int
    """R, class and register tokens, which come first."""
    side: int
    """S, that of the encoder's transform."""

    def encode_views(self, views: Tensor) -> Tensor:  # [B, 3, S, S] uint8 -> [B, R + N, C] fp32
        """Normalise and encode pictures of the encoder's side."""
        return self.encode(self.normalise(views))


class Encoder(Protocol):
    """An encoder in evaluation mode, frozen, on one device."""

    @property
    def name(self) -> str:
        """Return the text that it was asked for by."""

    @property
    def digest(self) -> str:
        """Return the SHA-256 of its weights and transform: equal digests have equal features."""

    @property
    def step(self) -> int | None:
        """Return the optimiser steps of the checkpoint that it is of; None: it is of none."""

    @property
    def device(self) -> torch.device:
        """Return the device that it computes on."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of matrix products; features are fp32 either way."""

    @property
    def transform(self) -> Callable[[Image], Tensor]:
        """Return what makes [3, S, S] of an upright RGB picture, pickled for the loader."""

    @property
    def has_text(self) -> bool:
        """Return whether it embeds texts, and pictures beside them."""

    @property
    def logit_scale(self) -> float | None:
        """Return the scale of its cosines under a softmax over texts; None: it embeds none."""

    @property
    def reads_class_token(self) -> bool:
        """Return whether what it was trained for reads a class token, if it has one.

        Else the mean of the patches sums a picture up, as in this package.
        """

    @property
    def patch_tokens(self) -> PatchTokens | None:
        """Return the tokens of the last block; None: it has no square grid of them."""

    @property
    def trainable(self) -> ImageEncoder | None:
        """Return what fine-tuning trains a copy of; None: it takes no encoder of this kind."""

    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return features of transformed pictures [B, 3, S, S], by name, [B, C] fp32 each.

        `class_L` and `mean_L`: class token and mean of the patches after the L-th block from the
        end, both after the final norm; `image`: the embedding that texts are compared with.
        """
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [B, E] fp32; ValueError without a text tower."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSettings:
    """How encoders are opened and compute."""

    device: torch.device
    dtype: torch.dtype | None = None
    """Of matrix products, float32 or bfloat16; None: bfloat16 on a GPU that has it."""
    allow_download: bool = False
    """Whether a library may fetch weights that are not in its cache."""


def weights_digest(module: nn.Module, *more: object) -> str:
    """Hash all weights and buffers of a module by name, and what else its features depend on."""
    hashed = hashlib.sha256("\n".join(map(str, more)).encode())
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        hashed.update(memoryview(content.numpy()))
    return hashed.hexdigest()


def by_mean_and_std(
    mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:  # [B, 3, S, S] uint8 -> fp32
    """Return what normalises pictures as torchvision's ToTensor and Normalize do."""

    def normalise(pictures: Tensor) -> Tensor:
        means, stds = (
            torch.tensor(of, device=pictures.device)[:, None, None] for of in (mean, std)
        )
        return (pictures.float() / 255 - means) / stds

    return normalise


@contextmanager
def outputs_of(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Yield a list that the outputs of blocks are appended to, in the order in which they run."""
    outputs: list[Any] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        outputs.append(output)

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def layer_features(
    tokens: Sequence[Tensor],  # [B, R + N, C] each, of the last block first, after the final norm
    *,
    num_prefix: int,
    has_class: bool,
) -> dict[str, Tensor]:
    """Return `mean_L` and, where the first prefix token is a class token, `class_L`."""
    features = {}
    for layer, of_layer in enumerate(tokens, start=1):
        features[f"mean_{layer}"] = of_layer[:, num_prefix:].float().mean(1)
        if has_class:
            features[f"class_{layer}"] = of_layer[:, 0].float()
    return features


def no_text(name: str) -> ValueError:
    """Return the error of an encoder that is asked to embed a text."""
    return ValueError(f"{name}: expected an encoder with a text tower, got one of pictures alone")
