"""Which parameters an optimiser treats alike: those of one learning rate that decay, or do not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.internimage.deformable import DCNv3

Named = tuple[str, nn.Parameter]
Group = dict[str, Any]

_TABLES = ("pos_embed", "mask_token", "class_token", "register_tokens", "token_embedding")


def group_parameters(named: Iterable[Named], lr_scales: dict[int, float]) -> list[Group]:
    """A group for each learning rate that there is, of what decays and of what does not.

    lr_scales: by the id of a parameter, 1 where it is not in there. A group holds `params`,
    `lr_scale` and `decays`.
    """
    found: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        key = (_decays(name, parameter), lr_scales.get(id(parameter), 1.0))
        found.setdefault(key, []).append(parameter)
    return [
        {"params": found[key], "decays": key[0], "lr_scale": key[1]}
        for key in sorted(found, reverse=True)
    ]


def lr_scales(model: nn.Module, *, layer_decay: float, dcn_lr_scale: float) -> dict[int, float]:
    """Learning rates of a trained image encoder's parameters over the schedule's, by their ids.

    layer_decay^(layers above), times dcn_lr_scale in what steers a deformable convolution.
    """
    scales: dict[int, float] = {}
    if layer_decay != 1.0:
        for encoder in trained_encoders(model):
            for name, parameter in encoder.named_parameters():
                scales[id(parameter)] = layer_decay ** encoder.layers_above(name)
    if dcn_lr_scale != 1.0:
        for parameter in _steering(model):
            scales[id(parameter)] = dcn_lr_scale * scales.get(id(parameter), 1.0)
    return scales


def freeze_patch_embed(model: nn.Module) -> None:
    """Take the patch embedding (InternImage: its stem) of every trained image encoder out of it.

    An average of the encoder keeps the same values: it started as a copy.
    """
    encoders = list(trained_encoders(model))
    if not encoders:
        raise ValueError("optim.freeze_patch_embed: expected an image encoder to train, got none")
    for encoder in encoders:
        encoder.get_submodule("patch_embed").requires_grad_(False)


def trained_encoders(model: nn.Module) -> Iterator[ImageEncoder]:
    """The image encoders in `model` that learn: no average, no teacher."""
    for module in model.modules():
        if isinstance(module, ImageEncoder) and any(p.requires_grad for p in module.parameters()):
            yield module


def _steering(model: nn.Module) -> Iterator[nn.Parameter]:
    """The projections that say where and how much DCNv3 samples: offsets, masks, gates."""
    for module in model.modules():
        if isinstance(module, DCNv3):
            yield from module.offset.parameters()
            yield from module.mask.parameters()
            gate = (module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias)
            yield from (parameter for parameter in gate if parameter is not None)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases, scalars, tokens and tables do not."""
    return parameter.ndim > 1 and not any(table in name for table in _TABLES)
