"""Encoders of timm: a model by name with its weights, a file of them, or a folder as on the hub.

Legend: B pictures, S side in pixels, R prefix tokens, N patches, C width.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.fields import expect_depth
from m3i_fast.did_you_mean import nearest
from m3i_fast.engine import teacher
from m3i_fast.engine.precision.arithmetic import compute_dtype
from m3i_fast.json_files import read_json
from m3i_fast.measuring.encoders.encoder import (
    NUM_LAYERS,
    EncoderSettings,
    PatchTokens,
    by_mean_and_std,
    layer_features,
    no_text,
    weights_digest,
)
from m3i_fast.measuring.encoders.offline import expect_cached, weights_from
from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.pipelines.optional_imports import require

INSTEAD = "name a file of weights: timm:NAME,checkpoint=FILE, or a folder: timm:FOLDER"


class TimmEncoder:
    """A model of timm without its classifier, and the transform of its pretrained_cfg.

    Of a model that is no plain transformer, `mean_1` is what its classifier reads
    (`forward_head(..., pre_logits=True)`), and there are no other layers.
    """

    has_text = False
    logit_scale = None
    step = None

    def __init__(self, name: str, model: Any, settings: EncoderSettings) -> None:
        data = require("timm.data", extra="timm")
        self.name, self.device = name, settings.device
        self.dtype = settings.dtype or compute_dtype("auto", settings.device)
        pixels = data.resolve_model_data_config(model)
        self._pixels = pixels
        self.transform = data.create_transform(**pixels, is_training=False)
        self._model = model.to(self.device).requires_grad_(False).eval()
        self.reads_class_token = getattr(model, "global_pool", "token") != "avg"
        self.digest = weights_digest(model, *_built_as(model, name), self.transform)

    @property
    def trainable(self) -> ImageEncoder | None:
        """Return the model as an encoder of this package, None for no plain transformer."""
        model = self._model
        if not has_layers(model):
            return None
        num_prefix, dim = model.num_prefix_tokens, model.num_features
        return teacher.TimmEncoder(model, num_prefix=num_prefix, dim=dim)

    @property
    def patch_tokens(self) -> PatchTokens | None:
        """Return the tokens of `forward_features`, None for no plain transformer."""
        _, height, width = self._pixels["input_size"]
        if not has_layers(self._model) or height != width:
            return None
        return PatchTokens(
            encode=self._tokens,
            normalise=by_mean_and_std(self._pixels["mean"], self._pixels["std"]),
            num_prefix=self._model.num_prefix_tokens,
            side=height,
        )

    def _tokens(self, pictures: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens: Tensor = self._model.forward_features(pictures.to(self.device))
        return tokens.float()

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return the features of pictures [B, 3, S, S], as `Encoder` names them."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return trunk_features(self._model, pictures.to(self.device))

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Raise ValueError: models of timm embed no text."""
        raise no_text(self.name)


def _built_as(model: Any, name: str) -> list[str]:
    """Return what a model's features depend on beside weights: its name, layers and arguments.

    The layers as torch prints them say most, but not the number of heads, say, which a folder's
    config.json may have in `model_args`.
    """
    config = Path(name.partition(":")[2]) / "config.json"
    built = json.loads(config.read_text()) if config.is_file() else {}
    named = (model.pretrained_cfg or {}).get("architecture")
    return [str(named), str(model), json.dumps(built, sort_keys=True)]


def trunk_features(model: Any, pictures: Tensor) -> dict[str, Tensor]:  # by name [B, C] fp32
    """Return the features of any model of timm, from one pass."""
    if not has_layers(model):
        pooled = model.forward_head(model.forward_features(pictures), pre_logits=True)
        return {"mean_1": pooled.float().flatten(1)}
    layers = model.forward_intermediates(
        pictures,
        indices=min(NUM_LAYERS, len(model.blocks)),
        norm=True,
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    return layer_features(
        [joined(layer) for layer in reversed(layers)],
        num_prefix=model.num_prefix_tokens,
        has_class=has_class_token(model),
    )


def has_layers(model: Any) -> bool:
    """Return whether a model of timm is a stack of blocks over prefix and patches."""
    method = getattr(model, "forward_intermediates", None)
    return (
        hasattr(model, "blocks")
        and hasattr(model, "num_prefix_tokens")
        and method is not None
        and "return_prefix_tokens" in inspect.signature(method).parameters
    )


def has_class_token(model: Any) -> bool:
    """Return whether the first prefix token of a model of timm is its class token."""
    return model.num_prefix_tokens > 0 and getattr(model, "cls_token", None) is not None


def joined(layer: Any) -> Tensor:  # [B, R + N, C]
    """Put the prefix before the patches of a layer, which timm returns as (patches, prefix)."""
    if isinstance(layer, Tensor):
        return layer
    patches, prefix = layer
    return torch.cat([prefix, patches], 1)


def open_timm(
    spec: str, name: str, checkpoint: Path | None, settings: EncoderSettings
) -> TimmEncoder:
    """Open a model of timm.

    name: of a model, or a folder with config.json. checkpoint: all of its weights. Raises
    ImportError without timm, FileNotFoundError for a file that is not there, ValueError for a name
    that timm does not know and for weights that do not fit or would have to be downloaded.
    """
    timm = require("timm", extra="timm")
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"{spec}: expected a file of weights, got none at {checkpoint}")
    full_name = f"local-dir:{name}" if Path(name).is_dir() else name
    if full_name == name and not name.startswith("hf-hub:") and not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise ValueError(f"{spec}: timm has no model {name}, and there is no such folder.{hint}")
    overlay = None
    if checkpoint is not None:  # by timm's own loader, which renames old keys
        overlay = {"file": str(checkpoint), "source": "", "custom_load": False}
    with weights_from(spec, allow_download=settings.allow_download, instead=INSTEAD):
        if overlay is None and full_name == name and not settings.allow_download:
            known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
            cache = Path(torch.hub.get_dir()) / "checkpoints"
            expect_cached(known.to_dict() if known else {}, cache, hub_key="hf_hub_id")
        if Path(name).is_dir():
            expect_depth(name, read_json(Path(name) / "config.json").get("model_args") or {})
        # The head is made and dropped: without one timm loads leniently, and names no missing one.
        model = timm.create_model(full_name, pretrained=True, pretrained_cfg_overlay=overlay)
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(0)
    return TimmEncoder(spec, model, settings)
