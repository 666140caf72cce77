"""Encoders of open_clip, of pictures and of texts, with its own transform and tokenizer.

Legend: B pictures or texts, S side in pixels, E embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.did_you_mean import nearest
from m3i_fast.engine.precision.arithmetic import compute_dtype
from m3i_fast.measuring.encoders.encoder import (
    NUM_LAYERS,
    EncoderSettings,
    PatchTokens,
    by_mean_and_std,
    layer_features,
    weights_digest,
)
from m3i_fast.measuring.encoders.offline import expect_cached, weights_from
from m3i_fast.measuring.encoders.timm_models import has_class_token, has_layers
from m3i_fast.pipelines.optional_imports import require

INSTEAD = (
    "name a file of weights: open_clip:NAME,checkpoint=FILE, or weights by their tag: "
    "open_clip:NAME,pretrained=TAG, or a folder: open_clip:FOLDER"
)


class OpenClipEncoder:
    """A model of open_clip with both of its towers.

    Of an image tower that is no plain transformer there are no layers: `image` alone.
    """

    has_text = True
    reads_class_token = True
    step = None
    trainable = None  # fine-tuning takes the encoders of this package and timm's

    def __init__(
        self,
        name: str,
        model: Any,
        config: str,
        transform: Any,
        tokenizer: Any,
        settings: EncoderSettings,
    ) -> None:
        self.name, self.device, self.transform = name, settings.device, transform
        self.dtype = settings.dtype or compute_dtype("auto", settings.device)
        self._model = model.to(self.device).requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self.logit_scale = float(model.logit_scale.exp())
        self.digest = weights_digest(model, config, _token_ids(tokenizer), transform)

    @property
    def patch_tokens(self) -> PatchTokens | None:
        """Return the tokens of the last block, None for no plain transformer."""
        pixels = require("open_clip", extra="shards").get_model_preprocess_cfg(self._model)
        side, *others = pixels["size"] if isinstance(pixels["size"], tuple) else (pixels["size"],)
        if _blocks(self._model.visual) is None or any(other != side for other in others):
            return None
        trunk = getattr(self._model.visual, "trunk", None)
        return PatchTokens(
            encode=lambda pictures: self._layers(pictures, 1)[0][0].float(),
            normalise=by_mean_and_std(pixels["mean"], pixels["std"]),
            num_prefix=1 if trunk is None else trunk.num_prefix_tokens,
            side=side,
        )

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the features of pictures [B, 3, S, S], as `Encoder` names them."""
        visual, trunk = self._model.visual, getattr(self._model.visual, "trunk", None)
        blocks = _blocks(visual)
        if blocks is None:
            with self._arithmetic():
                return {"image": self._model.encode_image(pictures.to(self.device)).float()}
        layers, image, num_prefix = self._layers(pictures, min(NUM_LAYERS, len(blocks)))
        has_class = num_prefix > 0 and (trunk is None or has_class_token(trunk))
        features = layer_features(layers, num_prefix=num_prefix, has_class=has_class)
        return {**features, "image": image.float()}

    @torch.no_grad()
    def _layers(self, pictures: Tensor, number: int) -> tuple[list[Tensor], Tensor, int]:
        """Return tokens [B, R + N, C] of the last blocks, the last first, embeddings [B, E], R."""
        with self._arithmetic():
            found = self._model.visual.forward_intermediates(
                pictures.to(self.device),
                indices=number,
                normalize_intermediates=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
        layers, prefix = found["image_intermediates"], found.get("image_intermediates_prefix")
        if prefix is not None:
            pairs = zip(prefix, layers, strict=True)
            layers = [torch.cat([first, rest], 1) for first, rest in pairs]
        num_prefix = 0 if prefix is None else prefix[0].shape[1]
        return [*reversed(layers)], found["image_features"], num_prefix

    def _arithmetic(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [B, E] fp32."""
        tokens = self._tokenizer(list(texts)).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            embedded: Tensor = self._model.encode_text(tokens)
        return embedded.float()


def _blocks(visual: Any) -> Any:
    """Return the blocks of an image tower that is a stack of them, else None."""
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return trunk.blocks if has_layers(trunk) else None
    return getattr(getattr(visual, "transformer", None), "resblocks", None)


def _token_ids(tokenizer: Any) -> list[list[int]]:
    """Return the ids of texts that tokenizers tell apart: case, marks, other scripts, length."""
    texts = ["a photo of a Cat.", "it's 2 naïve cafés, & <b>more</b>  ", "猫 Кот 🐈", "a b c " * 99]
    ids: list[list[int]] = tokenizer(texts).tolist()
    return ids


def _expect_its_activation(spec: str, name: str, pretrained: str | None) -> None:
    """Raise ValueError for weights of QuickGELU in a model without, of which open_clip warns."""
    open_clip = require("open_clip", extra="shards")
    known = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else None
    is_quick = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
    if (known or {}).get("quick_gelu", False) and not is_quick:
        raise ValueError(
            f"{spec}: {pretrained} was trained with QuickGELU, which {name} has not: expected "
            f"open_clip:{name}-quickgelu,pretrained={pretrained}"
        )


def open_open_clip(
    spec: str,
    name: str,
    *,
    checkpoint: Path | None,
    pretrained: str | None,
    settings: EncoderSettings,
) -> OpenClipEncoder:
    """Open a model of open_clip.

    name: of an architecture, or a folder with open_clip_config.json and weights. Of a name either
    `checkpoint`, a file, or `pretrained`, a tag, says which weights. Raises as `open_timm`.
    """
    open_clip = require("open_clip", extra="shards")
    is_folder = Path(name).is_dir()
    if is_folder and (checkpoint is not None or pretrained is not None):
        raise ValueError(f"{spec}: expected a folder alone, which has its weights")
    if not is_folder and (checkpoint is None) == (pretrained is None):
        raise ValueError(f"{spec}: expected its weights to be named once; {INSTEAD}")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"{spec}: expected a file of weights, got none at {checkpoint}")
    if not is_folder and name not in open_clip.list_models():
        hint = nearest(name, open_clip.list_models())
        raise ValueError(f"{spec}: open_clip has no model {name}, and no such folder.{hint}")
    if is_folder and not [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]:
        raise FileNotFoundError(f"{spec}: expected weights in the folder, got none")
    _expect_its_activation(spec, name, pretrained)
    full_name = f"local-dir:{name}" if is_folder else name
    with weights_from(spec, allow_download=settings.allow_download, instead=INSTEAD):
        if pretrained is not None and not settings.allow_download:
            known = open_clip.get_pretrained_cfg(name, pretrained) or {}
            expect_cached(known, Path("~/.cache/clip").expanduser(), hub_key="hf_hub")
        weights = str(checkpoint) if checkpoint else pretrained
        model, _, transform = open_clip.create_model_and_transforms(full_name, pretrained=weights)
        tokenizer = open_clip.get_tokenizer(full_name)
        config = json.dumps(open_clip.get_model_config(full_name), sort_keys=True)
    return OpenClipEncoder(spec, model, config, transform, tokenizer, settings)
