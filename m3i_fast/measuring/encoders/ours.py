"""Encoders of this package: of a run, a checkpoint or an export, trained or as it was initialised.

Legend: B pictures or texts, S side in pixels, C width, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.run_encoder import Which
from m3i_fast.engine.evaluator import build_untrained
from m3i_fast.engine.run.data_record import read_record
from m3i_fast.inference.loading import find_weights, load
from m3i_fast.inference.model import Model
from m3i_fast.inference.transform import normalise
from m3i_fast.measuring.encoders.encoder import (
    NUM_LAYERS,
    EncoderSettings,
    PatchTokens,
    layer_features,
    no_text,
    outputs_of,
    weights_digest,
)
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.terms import Caption


class RunEncoder:
    """The encoder of `m3i_fast.load`, with its caption head where it has one.

    Of an InternImage, whose stages differ in width, `mean_1` is all that there is.
    """

    reads_class_token = False

    def __init__(self, name: str, model: Model, tokenizer: str, step: int | None = None) -> None:
        """tokenizer: its fingerprint, empty where the run keeps none."""
        self.name, self.step, self._model = name, step, model
        self.device, self.dtype = model.device, model.compute_dtype
        self.transform = model.transform
        self.has_text = model.caption is not None
        self.logit_scale = float(model.logit_scale.exp()) if self.has_text else None
        text = None if model.caption is None else model.caption.text_encoder.cfg
        built = (model.encoder.cfg, text, tokenizer)
        self.digest = weights_digest(model, *built, model.transform)

    @property
    def trainable(self) -> ImageEncoder | None:
        """Return the encoder, None for an InternImage without dense tokens."""
        encoder = self._model.encoder
        return encoder if isinstance(encoder, ViT) or encoder.cfg.use_clip_projector else None

    @property
    def patch_tokens(self) -> PatchTokens | None:
        """Return the tokens of `forward_features`, None where `trainable` is."""
        model = self._model
        if self.trainable is None:
            return None
        return PatchTokens(
            encode=lambda pictures: model.forward_features(pictures).float(),
            normalise=lambda views: normalise(views, model.compute_dtype),
            num_prefix=model.num_prefix_tokens,
            side=model.transform.preprocessing.size,
        )

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the features of pictures [B, 3, S, S], as `Encoder` names them."""
        model, vit = self._model, self._model.encoder
        pictures = pictures.to(self.device)
        if not isinstance(vit, ViT):
            features = {"mean_1": model(pictures)}
            if self.has_text:
                features["image"] = model.encode_image(pictures).float()
            return features
        with outputs_of([*vit.blocks[-NUM_LAYERS:]]) as outputs:
            image = model.encode_image(pictures) if self.has_text else None
            if image is None:
                model.forward_features(pictures)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = [vit.norm(output.total()) for output in reversed(outputs)]
        features = layer_features(
            tokens, num_prefix=model.num_prefix_tokens, has_class=vit.class_token is not None
        )
        return features if image is None else {**features, "image": image.float()}

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [B, E] fp32."""
        if not self.has_text:
            raise no_text(self.name)
        return self._model.encode_text(list(texts)).float()


def open_run(name: str, path: Path, which: str, settings: EncoderSettings) -> RunEncoder:
    """Open a run, a checkpoint or an export; raises as `m3i_fast.load`."""
    model = load(path, which=cast(Which, which), device=settings.device, dtype=settings.dtype)
    return RunEncoder(name, model, _tokenizer(path), find_weights(path).step)


def open_untrained(name: str, path: Path, settings: EncoderSettings) -> RunEncoder:
    """Open the model that a run started from; raises as `m3i_fast.load`.

    Of a run that started from other weights (`--init`) it is still the random one.
    """
    model = load(path, device=settings.device, dtype=settings.dtype)
    objective = build_untrained(TrainConfig.load(find_weights(path).directory / "config.json"))
    model.encoder.load_state_dict(objective.encoder.state_dict())
    if model.caption is not None:
        (caption,) = objective.terms_of(Caption)
        model.caption.load_state_dict(caption.state_dict())
    return RunEncoder(name, model, _tokenizer(path))


def _tokenizer(path: Path) -> str:
    record = read_record(find_weights(path).directory)
    return "" if record is None else record.tokenizer.fingerprint
