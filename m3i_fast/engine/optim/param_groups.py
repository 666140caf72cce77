"""Parameter groups of an optimiser: by learning rate, and by whether weight decay applies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from m3i_fast.models.encoder import ImageEncoder
from m3i_fast.models.internimage.deformable import DCNv3

Named = tuple[str, nn.Parameter]
Group = dict[str, Any]

_TABLES = (
    *("pos_embed", "mask_token", "class_token", "register_tokens", "token_embedding"),
    *("cls_token", "reg_token", "dist_token"),  # timm's names
)


def group_parameters(named: Iterable[Named], lr_scales: dict[int, float]) -> list[Group]:
    """Return a group for each learning rate, split by whether weight decay applies.

    lr_scales: scale of the learning rate by the id of a parameter; 1 for an id that is not in it. A
    group has the keys `params`, `lr_scale` and `decays`.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}  # by (decays, lr_scale)
    for name, parameter in named:
        key = (_decays(name, parameter), lr_scales.get(id(parameter), 1.0))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[key], "decays": key[0], "lr_scale": key[1]}
        for key in sorted(groups, reverse=True)
    ]


def lr_scales(model: nn.Module, *, layer_decay: float, dcn_lr_scale: float) -> dict[int, float]:
    """Return the scale of the learning rate of a trained image encoder's parameters, by their ids.

    It is layer_decay^(layers above), times dcn_lr_scale for the projections to the offsets, masks
    and gates of a deformable convolution. The token that the encoder is given for hidden cells is
    of its lowest layer.
    """
    scales: dict[int, float] = {}
    mask_token = getattr(model, "mask_token", None)
    if layer_decay != 1.0:
        for encoder in trained_encoders(model):
            named = [*encoder.named_parameters()]
            if mask_token is not None:
                named.append(("mask_token", mask_token))
            for name, parameter in named:
                scales[id(parameter)] = layer_decay ** encoder.layers_above(name)
    if dcn_lr_scale != 1.0:
        for parameter in _steering(model):
            scales[id(parameter)] = dcn_lr_scale * scales.get(id(parameter), 1.0)
    return scales


def freeze_patch_embed(model: nn.Module) -> None:
    """Freeze the patch embedding (InternImage: its stem) of every trained image encoder in `model`.

    An EMA of the encoder keeps the same values, since it started as a copy. Raises ValueError where
    no image encoder is trained.
    """
    encoders = list(trained_encoders(model))
    if not encoders:
        raise ValueError(
            "optim.freeze_patch_embed: expected an image encoder to train, got none; set "
            "--optim.no-freeze-patch-embed"
        )
    for encoder in encoders:
        encoder.get_submodule("patch_embed").requires_grad_(False)


def trained_encoders(model: nn.Module) -> Iterator[ImageEncoder]:
    """Yield the image encoders in `model` that have trainable parameters: no EMA, no teacher."""
    for module in model.modules():
        if isinstance(module, ImageEncoder) and any(p.requires_grad for p in module.parameters()):
            yield module


def _steering(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that set where and how much DCNv3 samples: offsets, masks, gates."""
    for module in model.modules():
        if isinstance(module, DCNv3):
            yield from module.offset.parameters()
            yield from module.mask.parameters()
            gate = (module.center_feature_scale_proj_weight, module.center_feature_scale_proj_bias)
            yield from (parameter for parameter in gate if parameter is not None)


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: not to norms, biases, scalars, tokens and tables."""
    return parameter.ndim > 1 and not any(table in name for table in _TABLES)
