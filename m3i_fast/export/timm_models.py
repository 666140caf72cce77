"""The model that timm builds by its name alone and that is a given Vision Transformer.

The models of a width and patch, which their names tell, are built on the meta device, and their
weights' names and shapes, heads, activation and eps compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.timm import activation_of, check_model, to_timm
from m3i_fast.export.vit_names import BLOCK, STEM, ZEROS
from m3i_fast.models.transformer.vit import ViT

State = dict[str, Tensor]

_IMAGE_SIZE = re.compile(r"_(\d{3,4})(?=_|$)")
_WIDTHS = {  # and the word for each in a name
    **{192: "tiny", 256: "xsmall", 384: "small", 512: "medium", 640: "betwixt", 768: "base"},
    **{1024: "large", 1152: "so400m", 1280: "huge", 1408: "giant", 4096: "7b"},
}
_ROTARY = "dinov3"  # in the names of the models that turn queries and keys as ours


def model_of(vit: ViT) -> tuple[str, State] | None:
    """Return the name of a timm model that is `vit` without its head, and its weights by its names.

    With the pooling "avg" its output is the mean of the patches. None where timm has none.
    """
    cfg = vit.cfg
    if cfg.position == "rotary":
        for name in _of_width(cfg, _ROTARY):
            state = _eva_state(vit, _bare(name))
            if state is not None:
                return name, state
        return None
    if cfg.qkv_bias and not cfg.key_bias:
        return None
    state = {name: value.detach() for name, value in to_timm(vit).state_dict().items()}
    for name in _names(cfg):
        model = _bare(name)
        if _shapes(model.state_dict()) == _shapes(state) and _is_of(model, cfg):
            return name, state
    return None


def image_sizes(cfg: ViTConfig) -> list[int]:
    """Return the sides of images that names of timm's ViTs of this width and patch have."""
    found = {_image_size(name) for name in _of_width(cfg)}
    return sorted(size for size in found if size is not None)


def _names(cfg: ViTConfig) -> Iterator[str]:
    """Yield the models of this patch and image size, those that average patches first."""
    for name in sorted(_of_width(cfg), key=lambda name: ("gap" not in name, name)):
        if _image_size(name) in (cfg.image_size, None):
            yield name


def _of_width(cfg: ViTConfig, beginning: str = "") -> list[str]:
    """Return the ViTs of this width and patch whose name goes on with `beginning`."""
    import timm

    word = _WIDTHS.get(cfg.dim, "none")
    names: list[str] = timm.list_models(f"vit_{word}*_patch{cfg.patch_size}_{beginning}*")
    return names


def _image_size(name: str) -> int | None:
    """Return the side of the images that a name ends in; None where it has none, as DINOv2's."""
    match = _IMAGE_SIZE.search(name.split("_patch")[-1])
    return int(match[1]) if match else None


def _bare(name: str) -> Any:
    """Build a model without weights and without its head, with the average of its patches."""
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
        model.reset_classifier(0, global_pool="avg")
    return model


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _is_of(model: nn.Module, cfg: ViTConfig) -> bool:
    """Return whether what the weights do not show is as `cfg` has it."""
    try:
        check_model(model, cfg)
    except ValueError:
        return False
    return True


def _eva_state(vit: ViT, model: Any) -> State | None:
    """Return the weights for a DINOv3 of timm, or None where it is another network."""
    cfg, own = vit.cfg, vit.state_dict()
    expected = _shapes(model.state_dict())
    norms = {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
    block = model.blocks[0]
    kind = "swiglu" if isinstance(block.mlp.act, nn.SiLU) else activation_of(block.mlp.act)
    if (norms, block.attn.num_heads, kind) != ({cfg.norm_eps}, cfg.num_heads, cfg.mlp):
        return None
    for index in range(cfg.depth):
        own |= _query_key_value_bias(own, f"blocks.{index}.")
    rows = {"": STEM["timm"], **{f"blocks.{i}.": BLOCK["timm"] for i in range(cfg.depth)}}
    found: State = {}
    for prefix, names in rows.items():
        for theirs, ours in names.items():
            parts = [f"{prefix}{name}" for name in theirs]
            wanted = [name for name in parts if name != prefix + ZEROS]
            if prefix + ours in own and all(name in expected for name in wanted):
                values = own[prefix + ours].detach().chunk(len(parts))
                found |= {n: v for n, v in zip(parts, values, strict=True) if n in wanted}
                if not any(v.any() for n, v in zip(parts, values, strict=True) if n not in wanted):
                    del own[prefix + ours]
    left = [name for name, value in own.items() if "query_value" not in name and value.any()]
    return None if left or _shapes(found) != expected else found


def _query_key_value_bias(own: State, block: str) -> State:
    """Return the whole bias of a block that has one of queries and values alone."""
    bias = own.get(f"{block}query_value_bias")
    if bias is None:
        return {}
    query, value = bias.chunk(2)
    return {f"{block}layernorm_qkv.bias": torch.cat([query, torch.zeros_like(query), value])}
