"""A frozen teacher for the dense terms: the image encoder of one of our runs, or a timm model.

Letters: B images, R prefix tokens (class and registers), N cells of the grid, C width of a token.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from m3i_fast.config.convert import to_tree
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.run_encoder import NamedEncoder
from m3i_fast.costs.teacher_config import TIMM, run_vision
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.models.encoder import ImageEncoder, PackedCells, PackedTokens
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD


class Teacher(ImageEncoder):
    """An encoder that is never trained: no gradient, and always in evaluation mode.

    `dim` and `summary_dim` are those of the encoder. identity: what the encoder is beside its
    weights, in a text that another encoder does not have.
    """

    def __init__(self, encoder: ImageEncoder, identity: str = "") -> None:
        super().__init__()
        self.identity = identity
        self.encoder = encoder.requires_grad_(False).eval()
        self.dim, self.summary_dim = encoder.dim, encoder.summary_dim

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def encode_cells(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] as tokens [B, N, C]."""
        return self.encoder.encode_cells(images)

    @torch.no_grad()
    def encode_patches(
        self,
        patches: Tensor,
        cells: PackedCells,
        priority: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> PackedTokens:
        """Encode cells of pictures of any sizes, as the encoder does; priority: not read."""
        return self.encoder.encode_patches(patches, cells, mask_token=mask_token)

    @torch.no_grad()
    def summarise(self, tokens: Tensor) -> Tensor:
        """Summarise tokens [B, n, C] as [B, s, P], as the encoder does."""
        return self.encoder.summarise(tokens)


def load_teacher(spec: str, vision: VisionConfig) -> Teacher:
    """Load the encoder that `spec` names as the teacher of a student of `vision`.

    It reads the student's normalised views, [B, 3, S, S] with S = vision.image_size, and returns as
    many tokens as the student; their width is `dim`, which may differ from the student's.

    spec: a run directory of ours (its newest checkpoint is read; with `,which=ema` behind it the
    moving average of its encoder), `timm:NAME` (downloads the weights that are not in the hub's
    cache) or `timm:NAME:FILE.safetensors`, a file with all weights of that timm model. A position
    table of another image size is interpolated.

    Raises:
        FileNotFoundError: there is no such run, checkpoint or file.
        ImportError: timm is not installed.
        ConnectionError: the weights of `timm:NAME` cannot be downloaded.
        ValueError: the run has no moving average; timm has no such model, or the file does not fit
            it; the grid of tokens is not
            square or not the student's; the model expects other pixels than `ops.mask_mix` makes.
    """
    if spec.startswith(TIMM):
        return _load_timm(spec, vision)
    return _load_run(NamedEncoder.of(spec), vision)


# ---- One of our runs -----------------------------------------------------------------------------


def _load_run(named: NamedEncoder, vision: VisionConfig) -> Teacher:
    of_run = run_vision(named.run)
    _expect_grid(str(named.run), _side(of_run, vision.image_size), vision)
    encoder = build_encoder(of_run)
    encoder.load_state_dict(checkpoint.latest(named.run / "checkpoints").encoder(named.which))
    return Teacher(encoder, json.dumps(to_tree(of_run), sort_keys=True))


def _side(cfg: VisionConfig, image_size: int) -> int | None:
    """Return the tokens a side for an image of another size; None where patches do not fill it."""
    if image_size % cfg.size_multiple:
        return None
    return replace(cfg, image_size=image_size).grid


def _expect_grid(name: str, side: int | None, vision: VisionConfig) -> None:
    if side != vision.grid:
        got = f"{side} x {side}" if side else "an encoder of patches that do not fill it"
        raise ValueError(
            f"teacher {name}: expected {vision.grid} x {vision.grid} tokens of an image of "
            f"{vision.image_size} pixels, the student's grid, got {got}; change vision.patch_size "
            "or vision.image_size, or take another teacher"
        )


# ---- A model of timm -----------------------------------------------------------------------------


class TimmEncoder(ImageEncoder):
    """A timm model's patch tokens: its `forward_features` without the prefix tokens."""

    def __init__(self, model: nn.Module, *, num_prefix: int, dim: int) -> None:
        super().__init__()
        self.model, self.num_prefix = model, num_prefix
        self.dim = self.summary_dim = dim

    def encode_cells(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] as tokens [B, N, C]."""
        tokens: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        return tokens[:, self.num_prefix :]

    def summarise(self, tokens: Tensor) -> Tensor:
        """Return all tokens [B, n, C] unchanged."""
        return tokens

    def layers_above(self, parameter: str) -> int:
        """Count the layers above a parameter as timm's param_groups_layer_decay does.

        A head counts as a layer above the last block, whether the model has one or not. Raises
        ValueError where the model does not say how its layers are grouped.
        """
        from timm.models import group_parameters

        if not hasattr(self.model, "group_matcher"):
            return super().layers_above(parameter)
        with_head = nn.Module()
        for name, child in self.model.named_children():
            with_head.add_module(name, child)
        for name, own in self.model.named_parameters(recurse=False):
            with_head.register_parameter(name, own)
        with_head.added_head = nn.Linear(1, 1, device="meta")
        matcher = self.model.group_matcher(coarse=False)  # type: ignore[operator]
        layer = group_parameters(with_head, matcher, reverse=True)
        return int(layer["added_head.weight"] - layer[parameter.removeprefix("model.")])


def _load_timm(spec: str, vision: VisionConfig) -> Teacher:
    name, file = spec.removeprefix(TIMM), None
    if name.endswith(".safetensors"):
        name, _, path = name.rpartition(":")
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"teacher {spec}: no such file: {file}")
    model = _create(spec, name, file, vision.image_size)
    _expect_pixels(spec, model)
    features = _example(spec, model, vision.image_size)
    num_prefix, side = _patches(spec, model, features, vision.image_size)
    _expect_grid(spec, side, vision)
    encoder = TimmEncoder(model, num_prefix=num_prefix, dim=features.shape[2])
    return Teacher(encoder, f"timm:{name} of {vision.image_size} pixels")


def _create(spec: str, name: str, file: Path | None, image_size: int) -> Any:
    """Create the timm model with its weights and without a head."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(
            f'teacher {spec}: timm is not installed: pip install "m3i-fast[timm]"'
        ) from error
    # timm's own loader renames old keys and resizes positions. The head is created and dropped
    # afterwards, since without one timm loads leniently and reports no missing weight.
    overlay = {"file": str(file), "source": "", "custom_load": False} if file else None
    try:
        with torch.device("meta"):
            options = inspect.signature(type(timm.create_model(name)).__init__).parameters
        size = {"img_size": image_size} if "img_size" in options else {}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **size)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"teacher {spec}: {error}") from error
    except OSError as error:
        raise ConnectionError(
            f"teacher {spec}: expected to download its weights, got: {error}; without a network "
            f"name a file: timm:{name}:FILE.safetensors"
        ) from error
    model.reset_classifier(0)
    return model


def _expect_pixels(spec: str, model: nn.Module) -> None:
    from timm.data import resolve_model_data_config

    wants = resolve_model_data_config(model)
    for what, expected in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        if tuple(wants[what]) != expected:
            raise ValueError(
                f"teacher {spec}: expected pixels of {what} {expected}, as the student's are "
                f"normalised, got a model for {tuple(wants[what])}; take a teacher trained on those"
            )


@torch.no_grad()
def _example(spec: str, model: Any, size: int) -> Tensor:
    """Return the features of an image of zeros."""
    device = next(model.parameters()).device
    try:
        return model.eval().forward_features(torch.zeros(1, 3, size, size, device=device))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"teacher {spec}: expected to read {size} pixels, got: {error}") from error


def _patches(spec: str, model: Any, features: Tensor, size: int) -> tuple[int, int | None]:
    """Return the number of prefix tokens, and of patches a side where they fill an image."""
    embed, num_prefix = getattr(model, "patch_embed", None), getattr(model, "num_prefix_tokens", 0)
    rows, columns = getattr(embed, "grid_size", None) or (0, 0)
    count = num_prefix + rows * columns
    if embed is None or rows != columns or features.ndim != 3 or features.shape[1] != count:
        raise ValueError(
            f"teacher {spec}: expected [B, R + N, C] features of a square grid of patches, got "
            f"{list(features.shape)} of {rows} x {columns} patches and R = {num_prefix}; take a ViT"
        )
    return num_prefix, rows if rows * embed.patch_size[0] == size else None
