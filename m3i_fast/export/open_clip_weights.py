"""Weights of open_clip's models for our encoders: an image tower, and a text tower as CLIP's.

A file holds both towers; beside it a folder that open_clip wrote has open_clip_config.json, which
tells the heads, the kind of GELU and the norms' eps as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.export.text_weights import fitted_text
from m3i_fast.export.timm import described_by_timm
from m3i_fast.export.vit_names import OPEN_CLIP_BLOCK, OPEN_CLIP_RESBLOCKS, Renamed
from m3i_fast.export.vit_weights import FittedWeights, fold_pixel_statistics, vit_weights
from m3i_fast.export.weight_files import read_weights, some, tensors_in
from m3i_fast.json_files import read_json

State = dict[str, Tensor]

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the file of weights in a folder, the first that is there."""
_CONFIG_SHAPE = {"model_cfg": {"vision_cfg": dict, "text_cfg": dict}, "preprocess_cfg?": dict}
_EPS = 1e-5  # of its norms, where its config has no other
_HEAD_DIM = 64  # of its heads, likewise
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels, likewise: OpenAI's
_STD = (0.26862954, 0.26130258, 0.27577711)
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

    Its projection belongs to another pooling and is left out. Patches are embedded as if pixels
    were normalised by the mean and deviation of the folder, which are OpenAI's where it has none,
    as in open_clip; a file alone has no folder. Raises ValueError as `vit_weights`.
    """
    weights = _image_weights(file, cfg)
    if file.config:
        fold_pixel_statistics(weights, file.pixels.get("mean", _MEAN), file.pixels.get("std", _STD))
    weights.left_out += [name for name in file.state if name.startswith(_LOGITS)]
    return weights


def _image_weights(file: OpenClipFile, cfg: ViTConfig) -> FittedWeights:
    told: dict[str, Any] = {}
    vision = file.config.get("vision_cfg", {})
    trunk = {n.removeprefix(_TRUNK): v for n, v in file.state.items() if n.startswith(_TRUNK)}
    if trunk:
        if "timm_model_name" in vision:
            told = described_by_timm(vision["timm_model_name"])
        weights = vit_weights(trunk, "timm", cfg, told)
        return _with_sources(weights, "", _TRUNK)
    state = {name: value for name, value in file.state.items() if name.startswith(_VISUAL)}
    if vision:
        told = _told(file.config, vision, vision.get("width", 768), vision.get("head_width"))
    weights = vit_weights(_as_blocks(state), "open_clip", cfg, told)
    return _with_sources(weights, "blocks.", f"{_VISUAL}{OPEN_CLIP_RESBLOCKS}")


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


# ---- Texts ---------------------------------------------------------------------------------------


def text_weights(file: OpenClipFile, cfg: TextConfig) -> FittedWeights:
    """Return the weights of the text tower for a text encoder of `cfg`; raises as `fitted_text`."""
    named = _renamed(_text_state(file))
    width = named.tensors["projection.weight"].shape[1]
    told: dict[str, Any] = {"num_heads": width // _HEAD_DIM, "norm_eps": _EPS}
    if tower := file.config.get("text_cfg", {}):
        told |= _told(file.config, tower, width, None)
    return fitted_text(named, told, cfg)


def has_text(file: OpenClipFile) -> bool:
    """Return whether the file has weights besides those of the image tower."""
    return any(not name.startswith((_VISUAL, _LOGITS)) for name in file.state)


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


def _renamed(state: State) -> Renamed:
    """Give the weights of the text tower our names."""
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
    unused = [name for name in state if name not in names]
    if parts := [name for name in unused if name.startswith(OPEN_CLIP_RESBLOCKS)]:
        raise ValueError(f"expected a text tower as CLIP's, got more in it: {some(parts)}")
    return Renamed(tensors=tensors, sources=sources, left_out=unused)
