"""Weights of open_clip's models for our encoders: an image tower, and a text tower as CLIP's.

A file holds both towers; beside it a folder that open_clip wrote has open_clip_config.json, which
tells the heads, the kind of GELU and the norms' eps as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.timm import activation_of
from m3i_fast.export.vit_names import OPEN_CLIP_BLOCK, OPEN_CLIP_RESBLOCKS
from m3i_fast.export.vit_weights import FittedWeights, flag, vit_weights
from m3i_fast.export.weight_files import read_weights, tensors_in
from m3i_fast.json_files import read_json
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD

State = dict[str, Tensor]

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the file of weights in a folder, the first that is there."""
_CONFIG_SHAPE = {"model_cfg": {"vision_cfg": dict, "text_cfg": dict}, "preprocess_cfg?": dict}
NUM_SPECIAL = 2  # tokens at the end of the vocabulary: start and end
_EPS = 1e-5  # of its norms, where its config has no other
_HEAD_DIM = 64  # of its heads, likewise
_VISUAL, _TRUNK, _TEXT, _LOGITS = "visual.", "visual.trunk.", "text.", "logit_"


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenClipFile:
    """What is read of a model of open_clip."""

    path: Path
    """Of the file of weights."""
    state: State
    config: dict[str, Any]
    """`model_cfg`; empty for a file alone."""
    pixels: dict[str, Any]
    """`preprocess_cfg`; empty for a file alone."""


def read_open_clip(place: Path) -> OpenClipFile:
    """Read a file of weights, or a folder that open_clip wrote, with its config.

    Raises FileNotFoundError and ValueError as `read_weights`, and where the folder has none.
    """
    path, config = place, dict[str, Any]()
    if place.is_dir():
        found = [place / name for name in WEIGHTS if (place / name).is_file()]
        if not found or not (place / CONFIG).is_file():
            raise FileNotFoundError(
                f"{place}: expected a folder of open_clip with {CONFIG} and {' or '.join(WEIGHTS)}"
            )
        path, config = found[0], read_json(place / CONFIG, _CONFIG_SHAPE)
    state = {name.removeprefix("module."): v for name, v in tensors_in(read_weights(path)).items()}
    return OpenClipFile(
        path=path,
        state=state,
        config=config.get("model_cfg", {}),
        pixels=config.get("preprocess_cfg", {}),
    )


# ---- Images --------------------------------------------------------------------------------------


def image_weights(file: OpenClipFile, cfg: ViTConfig) -> FittedWeights:
    """Return the weights of the image tower, its own ViT or one of timm, for a ViT of `cfg`.

    Its projection belongs to another pooling and is left out. Where a folder says by which mean and
    deviation pixels were normalised, the patches are embedded as if they still were. Raises
    ValueError as `vit_weights`.
    """
    weights = _image_weights(file, cfg)
    if {"mean", "std"} <= file.pixels.keys():
        _expect_our_pixels(weights, file.pixels["mean"], file.pixels["std"])
    weights.left_out += [name for name in file.state if name.startswith(_LOGITS)]
    return weights


def _image_weights(file: OpenClipFile, cfg: ViTConfig) -> FittedWeights:
    told: dict[str, Any] = {}
    vision = file.config.get("vision_cfg", {})
    trunk = {n.removeprefix(_TRUNK): v for n, v in file.state.items() if n.startswith(_TRUNK)}
    if trunk:
        if "timm_model_name" in vision:
            told = _told_by_timm(vision["timm_model_name"])
        weights = vit_weights(trunk, "timm", cfg, told)
        return _with_sources(weights, "", _TRUNK)
    state = {name: value for name, value in file.state.items() if name.startswith(_VISUAL)}
    if vision:
        told = _told(file.config, vision, vision.get("width", 768), vision.get("head_width"))
    weights = vit_weights(_as_blocks(state), "open_clip", cfg, told)
    return _with_sources(weights, "blocks.", f"{_VISUAL}{OPEN_CLIP_RESBLOCKS}")


def _expect_our_pixels(weights: FittedWeights, mean: Sequence[float], std: Sequence[float]) -> None:
    """Embed pixels normalised by ImageNet's mean and deviation as those by `mean` and `std`.

    A value y of ours is (y s + m - mean) / std by theirs, which is linear as the embedding is.
    """
    name = "patch_embed.weight"
    own_mean, own_std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    theirs, deviation = torch.tensor(mean), torch.tensor(std)
    if torch.equal(own_mean, theirs) and torch.equal(own_std, deviation):
        return
    kernels = weights.tensors[name]  # [C, 3, P, P]
    offset = kernels.sum((2, 3)) @ ((own_mean - theirs) / deviation)
    weights.tensors[name] = kernels * (own_std / deviation)[:, None, None]
    weights.tensors["patch_embed.bias"] = weights.tensors["patch_embed.bias"] + offset
    for changed in (name, "patch_embed.bias"):
        before = weights.changes.get(changed)
        told = "for pixels by ImageNet's mean and deviation"
        weights.changes[changed] = f"{before}, {told}" if before else told


def _as_blocks(state: Mapping[str, Tensor]) -> State:
    """Return the image tower with its blocks and tokens as others name and shape theirs."""
    start = f"{_VISUAL}{OPEN_CLIP_RESBLOCKS}"
    shapes = {"visual.class_embedding": (1, 1, -1), "visual.positional_embedding": (1, -1)}
    found = {}
    for name, value in state.items():
        if name in shapes:
            value = value.reshape(*shapes[name], *value.shape[1:])
        found[f"blocks.{name.removeprefix(start)}" if name.startswith(start) else name] = value
    return found


def _with_sources(weights: FittedWeights, ours: str, theirs: str) -> FittedWeights:
    """Give the names in the file their beginning again."""

    def whole(name: str) -> str:
        parts = name.split(" + ")
        return " + ".join(
            theirs + part.removeprefix(ours) if part.startswith(ours) else part for part in parts
        )

    kept = "none in the file"
    weights.sources = {n: s if s == kept else whole(s) for n, s in weights.sources.items()}
    weights.left_out = [whole(name) for name in weights.left_out]
    return weights


def _told(
    model: Mapping[str, Any], tower: Mapping[str, Any], width: int, head_width: int | None
) -> dict[str, Any]:
    """Return what the config of a tower says of an encoder beside the shapes of its weights."""
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    mlp = "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
    eps = (tower.get("norm_kwargs") or {}).get("eps", _EPS)
    heads = tower.get("heads", width // (head_width or _HEAD_DIM))
    return {"mlp": mlp, "norm_eps": eps, "num_heads": heads}


def _told_by_timm(name: str) -> dict[str, Any]:
    """Return the same of a model of timm, which timm builds by its name."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if not isinstance(model, VisionTransformer):
        return {}
    block = model.blocks[0]
    kind = activation_of(block.mlp.act)
    told = {"norm_eps": block.norm1.eps, "num_heads": block.attn.num_heads}
    return told if kind == "SiLU" else {**told, "mlp": kind}


# ---- Texts ---------------------------------------------------------------------------------------


def text_weights(file: OpenClipFile, cfg: TextConfig) -> FittedWeights:
    """Return the weights of the text tower for a text encoder of `cfg`.

    Of a smaller vocabulary, which has the first of CLIP's merges, the tokens that it has are taken,
    of fewer positions the first. Raises ValueError where `cfg` is another network, with the flags.
    """
    state = _text_state(file)
    tensors, sources, left_out = _renamed(state)
    _expect_same(file.config, tensors, cfg)
    changes = {}
    vocab_size, length = len(tensors["token_embedding.weight"]), tensors["pos_embed"].shape[1]
    if cfg.vocab_size < vocab_size:
        table, kept = tensors["token_embedding.weight"], cfg.vocab_size - NUM_SPECIAL
        tensors["token_embedding.weight"] = torch.cat([table[:kept], table[-NUM_SPECIAL:]])
        changes["token_embedding.weight"] = (
            f"the first {kept} of {vocab_size} tokens, start and end"
        )
    if cfg.context_length < length:
        tensors["pos_embed"] = tensors["pos_embed"][:, : cfg.context_length].clone()
        changes["pos_embed"] = f"the first {cfg.context_length} of {length} positions"
    with torch.device("meta"):
        expected = TextEncoder(cfg).state_dict()
    wrong = [
        f"{name}: expected {list(value.shape)}, got "
        f"{list(tensors[name].shape) if name in tensors else 'none'}"
        for name, value in expected.items()
        if name not in tensors or tensors[name].shape != value.shape
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    return FittedWeights(
        tensors={name: tensors[name] for name in expected},
        sources=sources,
        changes=changes,
        left_out=left_out,
    )


def _text_state(file: OpenClipFile) -> State:
    """Return the weights of the text tower without its prefix, which older files do not have."""
    tower = file.config.get("text_cfg", {})
    if tower.get("no_causal_mask") or tower.get("pool_type", "argmax") not in ("argmax", "eos"):
        raise ValueError(
            "expected a text tower as CLIP's, causal and read at its end, got one with "
            f"no_causal_mask {tower.get('no_causal_mask')} and pool_type {tower.get('pool_type')}"
        )
    found = {n.removeprefix(_TEXT): v for n, v in file.state.items() if n.startswith(_TEXT)}
    if not found:
        other = (_VISUAL, _LOGITS)
        found = {name: value for name, value in file.state.items() if not name.startswith(other)}
    theirs = "token_embedding.weight", "positional_embedding", "text_projection"
    strange = [n for n in found if n in ("cls_emb", "text_projection.bias") or "bert" in n]
    missing = [name for name in theirs if name not in found]
    if missing or strange:
        raise ValueError(
            f"expected a text tower as CLIP's, with {', '.join(theirs)}, got one "
            + (f"with {', '.join(strange)}" if strange else f"without {', '.join(missing)}")
        )
    return found


def _renamed(state: State) -> tuple[State, dict[str, str], list[str]]:
    """Return the weights by our names, their names by ours, and those that are not used."""
    names = {
        "token_embedding.weight": "token_embedding.weight",
        "positional_embedding": "pos_embed",
        "ln_final.weight": "norm.weight",
        "ln_final.bias": "norm.bias",
        "text_projection": "projection.weight",
    }
    depth = len({n.split(".")[2] for n in state if n.startswith(OPEN_CLIP_RESBLOCKS)})
    for index in range(depth):
        start = f"{OPEN_CLIP_RESBLOCKS}{index}."
        names |= {start + n: f"blocks.{index}.{o}" for (n,), o in OPEN_CLIP_BLOCK.items()}
    tensors = {ours: state[theirs].float() for theirs, ours in names.items() if theirs in state}
    tensors["pos_embed"] = tensors["pos_embed"][None]
    tensors["projection.weight"] = tensors["projection.weight"].T.contiguous()
    sources = {ours: theirs for theirs, ours in names.items() if theirs in state}
    return tensors, sources, [name for name in state if name not in names]


def _expect_same(config: Mapping[str, Any], tensors: State, cfg: TextConfig) -> None:
    """Raise ValueError where `cfg` is another network than the file's, with the flags of that."""
    wrong = list(_differing(config, tensors, cfg))
    if wrong:
        expected = ", ".join(f"{name} {getattr(cfg, name)}" for name, _ in wrong)
        got = ", ".join(f"{name} {value}" for name, value in wrong)
        flags = " ".join(flag("text", name, value) for name, value in wrong)
        raise ValueError(f"expected a text tower of {expected}, got one of {got}: add {flags}")
    own = len(tensors["token_embedding.weight"]), tensors["pos_embed"].shape[1]
    if cfg.vocab_size > own[0] or cfg.context_length > own[1]:
        raise ValueError(
            f"expected {cfg.vocab_size} tokens and {cfg.context_length} positions, those of the "
            f"data, got {own[0]} and {own[1]}: pack the data with at most as many"
        )


def _differing(
    config: Mapping[str, Any], tensors: State, cfg: TextConfig
) -> Iterator[tuple[str, object]]:
    """Yield the fields that a file has otherwise than `cfg`, with the file's value."""
    tower = config.get("text_cfg", {})
    hidden, width = tensors["blocks.0.layernorm_mlp.fc1_weight"].shape
    found: dict[str, Any] = {
        "dim": width,
        "depth": 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("blocks.")),
        "embed_dim": len(tensors["projection.weight"]),
        "attention": "causal",
        "num_heads": width // _HEAD_DIM,
        "norm_eps": _EPS,
    }
    if tower:
        found |= _told(config, tower, width, None)
    if hidden != int(cfg.dim * cfg.mlp_ratio) or width != cfg.dim:
        if hidden / width != cfg.mlp_ratio:
            found["mlp_ratio"] = hidden / width
    yield from ((name, value) for name, value in found.items() if getattr(cfg, name) != value)
