"""Weights of a published InternImage for an encoder that is trained on.

Stem and stages are taken; of H and G the projector as well, which gives the dense tokens and the
pooled vector. The smaller ones, and detectors, have a convolutional head or none, so that an
encoder of theirs begins with a new projector. Legend: G groups, K side of the deformable kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.models import internimage as sizes
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.export.internimage import STAGES, official_names
from m3i_fast.export.vit_weights import FittedWeights, flag
from m3i_fast.export.weight_files import some
from m3i_fast.models.internimage.model import InternImage

Make = Callable[[], InternImageConfig]

ARCHITECTURES: Sequence[Make] = (
    *(sizes.internimage_t, sizes.internimage_s, sizes.internimage_b, sizes.internimage_l),
    *(sizes.internimage_xl, sizes.internimage_h, sizes.internimage_g),
)
NUM_POINTS = 9  # K ** 2
_LAYER = re.compile(r"levels\.(\d)\.blocks\.(\d+)\.")
_PROJECTOR = "dcnv3_head_x3.weight"
# Fields by which two encoders are different networks.
_NETWORK = (
    "channels",
    "depths",
    "groups",
    "mlp_ratio",
    "layer_scale",
    "offset_scale",
    "post_norm",
    "dw_kernel_size",
    "level2_post_norm",
    "level2_post_norm_block_ids",
    "res_post_norm",
    "center_feature_scale",
)
_PROJECTED = ("token_dim", "pool_heads", "pooled_dim")


def internimage_weights(state: Mapping[str, Tensor], cfg: InternImageConfig) -> FittedWeights:
    """Return the weights of a published file, in any of its layouts, for an encoder of `cfg`.

    `state` is what the file holds, by its names; halves are widened. It does not say the scale of
    offsets, the heads of the pooling or, with gates, where norms stand: these are expected as of
    the published size, and for other sizes those of cfg are believed. Raises ValueError where `cfg`
    is another network, with the flags of the file's, and for a file of another model.
    """
    names = official_names({name: name for name in state})
    tensors = {new: state[old] for new, old in names.items()}
    tensors = {n: v.float() if v.is_floating_point() else v for n, v in tensors.items()}
    _expect_internimage(tensors)
    published = _nearest(tensors)
    of_file = _config_of(tensors, published(), cfg)
    if wrong := _differing(of_file, cfg, has_projector=_PROJECTOR in tensors):
        raise ValueError(
            f"expected weights for the run's InternImage, {_told(cfg, wrong)}, got a file nearest "
            f"to {published.__name__}, {_told(of_file, wrong)}: add {_flags(of_file, wrong)}"
        )
    with torch.device("meta"):
        expected = InternImage(cfg).state_dict()
    new = [name for name in expected if name not in tensors]
    if missing := [name for name in new if name.startswith(STAGES)]:
        raise ValueError(f"missing: {some(missing)}")
    taken = {name: tensors[name] for name in expected if name in tensors}
    wrong_shapes = [
        f"{names[name]}: expected {list(expected[name].shape)}, got {list(value.shape)}"
        for name, value in taken.items()
        if value.shape != expected[name].shape
    ]
    if wrong_shapes:
        raise ValueError(some(wrong_shapes))
    sources = {name: names[name] for name in taken}
    used = set(sources.values())
    return FittedWeights(
        tensors=taken,
        sources=sources,
        left_out=[name for name in state if name not in used],
        new=new,
        architecture=published.__name__,
    )


def _expect_internimage(tensors: Mapping[str, Tensor]) -> None:
    signs = "patch_embed.conv1.weight", "levels.0.blocks.0.dcn.mask.weight"
    if any(name not in tensors for name in signs):
        raise ValueError(
            f"expected the names of InternImage, such as {' and '.join(signs)}, got "
            f"{some(list(tensors)[:5]) or 'no tensor'}"
        )


# ---- What network a file is of -------------------------------------------------------------------


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what names and shapes say of the fields of an InternImageConfig."""
    depths = [0, 0, 0, 0]
    for name in tensors:
        if match := _LAYER.match(name):
            stage, layer = map(int, match.groups())
            depths[stage] = max(depths[stage], layer + 1)
    first = "levels.0.blocks.0."
    hidden, channels = tensors[f"{first}mlp.fc1.weight"].shape
    masks = [tensors[f"levels.{stage}.blocks.0.dcn.mask.weight"] for stage in range(4)]
    found = {
        "channels": channels,
        "depths": tuple(depths),
        "groups": tuple(len(mask) // NUM_POINTS for mask in masks),
        "mlp_ratio": hidden / channels,
        "dw_kernel_size": tensors[f"{first}dcn.dw_conv.0.weight"].shape[-1],
        "res_post_norm": f"{first}res_post_norm1.0.weight" in tensors,
        "center_feature_scale": f"{first}dcn.center_feature_scale_proj_weight" in tensors,
        "use_clip_projector": _PROJECTOR in tensors,
    }
    if _PROJECTOR in tensors:
        found["token_dim"] = len(tensors[_PROJECTOR])
        found["pooled_dim"] = len(tensors["fc_norm.0.weight"])
    return found


def _nearest(tensors: Mapping[str, Tensor]) -> Make:
    """Return the nearest published size."""
    found = _sizes(tensors)

    def distance(make: Make) -> float:
        cfg = make()
        pairs = [(found["channels"], cfg.channels), *zip(found["depths"], cfg.depths, strict=True)]
        size = sum(abs(math.log(max(a, 1) / b)) for a, b in pairs)
        options = ("res_post_norm", "center_feature_scale")
        return size + sum(found[name] != getattr(cfg, name) for name in options)

    return min(ARCHITECTURES, key=distance)


def _config_of(
    tensors: Mapping[str, Tensor], published: InternImageConfig, cfg: InternImageConfig
) -> InternImageConfig:
    """Return the config of the file's network; `published` says what its shapes do not.

    An initial layer scale is only there or not. Of no published size `cfg` is believed.
    """
    found = _sizes(tensors)
    if any(found[name] != getattr(published, name) for name in ("channels", "depths")):
        unseen = ("offset_scale", "pool_heads", "post_norm")
        published = replace(published, **{name: getattr(cfg, name) for name in unseen})
    if found["dw_kernel_size"] == published.context_size:
        found["dw_kernel_size"] = published.dw_kernel_size
    scaled = "levels.0.blocks.0.gamma1" in tensors
    found["layer_scale"] = (cfg.layer_scale or published.layer_scale or 1e-5) if scaled else None
    if not found["center_feature_scale"]:  # then a stage ends in a norm if its layers begin in one
        found["post_norm"] = "levels.0.norm.0.weight" not in tensors
    count = len({n.split(".")[3] for n in tensors if n.startswith("levels.2.post_norms.")})
    found["level2_post_norm"] = count > 0
    ids = published.level2_post_norm_block_ids or ()
    if len(ids) != count:  # of no published size: one after every sixth layer, as in H and G
        ids = cfg.level2_post_norm_block_ids or tuple(range(5, found["depths"][2], 6))
    found["level2_post_norm_block_ids"] = ids if count else None
    return replace(published, **found, num_classes=0, image_size=cfg.image_size)


def _differing(
    of_file: InternImageConfig, cfg: InternImageConfig, *, has_projector: bool
) -> list[str]:
    """Return the fields by which two configs are different networks."""
    names = [*_NETWORK, *(_PROJECTED if has_projector else ())]
    same = of_file.context_size == cfg.context_size
    return [
        name
        for name in names
        if getattr(of_file, name) != getattr(cfg, name) and not (name == "dw_kernel_size" and same)
    ]


def _told(cfg: InternImageConfig, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {getattr(cfg, name)}" for name in names)


def _flags(cfg: InternImageConfig, names: Sequence[str]) -> str:
    """Return the flags of these fields, several numbers one after the other."""
    flags = []
    for name in names:
        value = getattr(cfg, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        flags.append(flag("vision", name, shown))
    return " ".join(flags)
