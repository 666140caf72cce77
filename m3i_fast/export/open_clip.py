"""Both towers of a model as open_clip builds them from a config alone, with equal embeddings.

The image tower is open_clip's own ViT, or one that timm builds by its name; the text tower is
open_clip's own. What neither has a form of is refused, with the flags of a new run that it has.

Legend: C width of the encoder, E width of an embedding, H hidden width of the head, N patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.fields import Mlp
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.timm_models import image_sizes, model_of
from m3i_fast.export.vit_names import OPEN_CLIP_BLOCK, OPEN_CLIP_RESBLOCKS
from m3i_fast.export.vit_weights import flag
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenClipModel:
    """A model of open_clip: what builds it, and its weights by open_clip's names."""

    config: dict[str, Any]
    """`model_cfg` of an open_clip_config.json."""
    weights: State
    image_tower: str
    """The name of a model of timm, or what stands for open_clip's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tower:
    name: str
    config: dict[str, Any]
    weights: State


@dataclass(frozen=True, slots=True)
class _Unmet:
    """A field of a run that open_clip's towers have otherwise."""

    part: str
    field: str
    expected: object
    got: object
    at_most: bool = False

    def __str__(self) -> str:
        bound = "at most " * self.at_most
        return f"{self.part}.{self.field} {bound}{self.expected} (got {self.got})"

    @property
    def flag(self) -> str:
        return flag(self.part, self.field, self.expected)


def to_open_clip(
    vit: ViT,
    head: Mapping[str, Tensor],
    text: TextEncoder,
    *,
    log_scale: Tensor,  # []
    bias: Tensor | None,  # []
) -> OpenClipModel:
    """Return what open_clip's CustomTextCLIP is built of, with the embeddings of these modules.

    head: the weights of the head that embeds the mean of the patches, a `GlobalHead`'s. log_scale,
    bias: of the cosines; a bias is that of the sigmoid likelihood. The weights are copies, on the
    CPU. Raises ValueError where open_clip has no such towers.
    """
    image = _image_tower(vit, head)
    unmet = list(_text_unmet(text.cfg))
    problems = []
    if isinstance(image, str):
        problems.append(image)
    elif "timm_model_name" not in image.config:
        unmet += _quick_gelu_unmet(vit.cfg.mlp, text.cfg.mlp)
    if unmet:
        flags = " ".join(each.flag for each in unmet)
        problems.append(f"text tower: expected {', '.join(map(str, unmet))}: {flags}")
    if problems:
        raise ValueError(
            "--to open_clip: open_clip can build no such model: "
            + "; ".join(problems)
            + ". The flags are those of a new run; this one goes --to safetensors or --to hf"
        )
    assert isinstance(image, _Tower)
    weights = {f"visual.{name}": value for name, value in image.weights.items()}
    weights |= {f"text.{name}": value for name, value in _text_weights(text).items()}
    weights["logit_scale"] = log_scale
    config: dict[str, Any] = {
        "embed_dim": text.cfg.embed_dim,
        "custom_text": True,
        "quick_gelu": text.cfg.mlp == "quick_gelu",
        "vision_cfg": image.config,
        "text_cfg": _text_config(text.cfg),
    }
    if bias is not None:
        weights["logit_bias"], config["init_logit_bias"] = bias, 0.0
    return OpenClipModel(
        config=config,
        weights={
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in weights.items()
        },
        image_tower=image.name,
    )


# ---- Images --------------------------------------------------------------------------------------


def _image_tower(vit: ViT, head: Mapping[str, Tensor]) -> _Tower | str:
    """Return the encoder and its head as a tower of open_clip, or why there is none."""
    cfg = vit.cfg
    hidden = head["hidden.weight"].shape[0] if "hidden.weight" in head else 0
    most = 2 * head["output.weight"].shape[0]
    own = list(_own_unmet(cfg, hidden))
    if not own:
        return _own_tower(vit, head["output.weight"])
    found = None if hidden > most else model_of(vit)
    if found is not None:
        return _timm_tower(cfg, head, *found)
    too_wide = _Unmet("objective", "head_hidden_dim", most, hidden, at_most=True)
    by_timm = (
        f"expected {too_wide}: {too_wide.flag}"
        if hidden > most
        else "expected a model that timm builds by its name, which has none with the sizes and "
        f"options of this encoder; those of vision.dim {cfg.dim} and vision.patch_size "
        f"{cfg.patch_size} are for images of {image_sizes(cfg) or 'no size'}"
    )
    return (
        f"image tower: its own ViT: expected {', '.join(map(str, own))}: "
        f"{' '.join(each.flag for each in own)}; or a ViT of timm: {by_timm}"
    )


def _own_unmet(cfg: ViTConfig, hidden: int) -> Iterator[_Unmet]:
    """Yield what is not as in open_clip's own ViT."""
    if hidden:
        yield _Unmet("objective", "head_hidden_dim", 0, hidden)
    expected = {"class_token": True, "num_registers": 0, "position": "absolute", "final_norm": True}
    for name, value in expected.items():
        if getattr(cfg, name) != value:
            yield _Unmet("vision", name, value, getattr(cfg, name))
    if cfg.mlp == "swiglu":
        yield _Unmet("vision", "mlp", "gelu", cfg.mlp)


def _quick_gelu_unmet(vision: Mlp, text: Mlp) -> Iterator[_Unmet]:
    """Yield that one of open_clip's own towers has QuickGELU, which they have both or neither."""
    if (vision == "quick_gelu") != (text == "quick_gelu"):
        yield _Unmet("text", "mlp", vision, text)


def _own_tower(vit: ViT, projection: Tensor) -> _Tower:
    """Return open_clip's ViT, which has a class token and no bias in its patches' embedding.

    The bias is added to the positions of the patches. projection: [E, C].
    """
    cfg, state = vit.cfg, vit.state_dict()
    patches = state["pos_embed"][0] + state["patch_embed.bias"]  # [N, C]
    weights = {
        "conv1.weight": state["patch_embed.weight"],
        "class_embedding": state["class_token"].flatten(),
        "positional_embedding": torch.cat([torch.zeros_like(patches[:1]), patches]),
        "ln_post.weight": state["norm.weight"],
        "ln_post.bias": state["norm.bias"],
        "proj": projection.T,
        **_blocks(state, cfg.depth),
    }
    if cfg.pre_norm:
        weights |= {f"ln_pre.{kind}": state[f"norm_pre.{kind}"] for kind in ("weight", "bias")}
    config = {
        "image_size": cfg.image_size,
        "patch_size": cfg.patch_size,
        "width": cfg.dim,
        "layers": cfg.depth,
        "head_width": cfg.dim // cfg.num_heads,
        "mlp_ratio": cfg.mlp_ratio,
        "ls_init_value": cfg.layer_scale_init,
        "no_ln_pre": not cfg.pre_norm,
        "pool_type": "avg",
        **_layers(cfg.mlp, cfg.norm_eps),
    }
    return _Tower(name="its own ViT", config=config, weights=weights)


def _timm_tower(cfg: ViTConfig, head: Mapping[str, Tensor], name: str, trunk: State) -> _Tower:
    """Return a model of timm with the head that open_clip puts on it: of 2 E hidden features.

    Fewer are padded with zeros, which change nothing.
    """
    output, has_hidden = head["output.weight"], "hidden.weight" in head
    weights = {f"trunk.{key}": value for key, value in trunk.items()}
    if has_hidden:
        more = 2 * output.shape[0] - output.shape[1]
        pad = torch.nn.functional.pad
        weights |= {
            "head.mlp.fc1.weight": pad(head["hidden.weight"], (0, 0, 0, more)),
            "head.mlp.fc1.bias": pad(head["hidden.bias"], (0, more)),
            "head.mlp.fc2.weight": pad(output, (0, more)),
            "head.mlp.fc2.bias": head["output.bias"],
        }
    else:
        weights["head.proj.weight"] = output
    config = {
        "image_size": cfg.image_size,
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "mlp" if has_hidden else "linear",
        "timm_proj_bias": has_hidden,
    }
    return _Tower(name=name, config=config, weights=weights)


# ---- Texts ---------------------------------------------------------------------------------------


def _text_unmet(cfg: TextConfig) -> Iterator[_Unmet]:
    if cfg.attention != "causal":
        yield _Unmet("text", "attention", "causal", cfg.attention)


def _text_config(cfg: TextConfig) -> dict[str, Any]:
    return {
        "context_length": cfg.context_length,
        "vocab_size": cfg.vocab_size,
        "width": cfg.dim,
        "heads": cfg.num_heads,
        "layers": cfg.depth,
        "mlp_ratio": cfg.mlp_ratio,
        "pool_type": "argmax",  # the end has the largest id
        **_layers(cfg.mlp, cfg.norm_eps),
    }


def _text_weights(text: TextEncoder) -> State:
    state = text.state_dict()
    return {
        "token_embedding.weight": state["token_embedding.weight"],
        "positional_embedding": state["pos_embed"][0],
        "ln_final.weight": state["norm.weight"],
        "ln_final.bias": state["norm.bias"],
        "text_projection": state["projection.weight"].T,
        **_blocks(state, text.cfg.depth),
    }


# ---- Both ----------------------------------------------------------------------------------------


def _layers(mlp: Mlp, norm_eps: float) -> dict[str, Any]:
    """Return the arguments of a tower's norms and activations; quick_gelu is the model's."""
    tanh = {"act_kwargs": {"approximate": "tanh"}} if mlp == "gelu_tanh" else {}
    return {"norm_kwargs": {"eps": norm_eps}, **tanh}


def _blocks(state: Mapping[str, Tensor], depth: int) -> State:
    """Return the blocks by open_clip's names, with zeros for a bias of queries that we lack."""
    found = {}
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"{OPEN_CLIP_RESBLOCKS}{index}."
        for (name,), own in OPEN_CLIP_BLOCK.items():
            if ours + own in state:
                found[theirs + name] = state[ours + own]
        found.setdefault(f"{theirs}attn.in_proj_bias", _qkv_bias(state, ours))
    return found


def _qkv_bias(state: Mapping[str, Tensor], block: str) -> Tensor:  # [3 C]
    """Return the bias of a block that has none, or one of queries and values alone."""
    bias = state.get(f"{block}query_value_bias")
    if bias is None:
        return state[f"{block}layernorm_qkv.weight"].new_zeros(
            len(state[f"{block}proj.weight"]) * 3
        )
    query, value = bias.chunk(2)
    return torch.cat([query, torch.zeros_like(query), value])
