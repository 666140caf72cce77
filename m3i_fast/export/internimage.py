"""InternImage weights from the published files, and back into their layouts.

classification  .pth {"model": keys} or {"module": keys}, the official names
detection       .pth {"state_dict": keys}, prefix `backbone.`, no head; segmentation as well
huggingface     .safetensors, prefix `model.`, layer_scale1/2 for gamma1/2
pre-training    .pth with mask_token, `dcnv3.` before the stages; read only
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.durable_files import replaced_atomically
from m3i_fast.export.weight_files import read_weights, some, tensors_in, write_weights
from m3i_fast.models.internimage.model import InternImage

logger = logging.getLogger(__name__)

Layout = Literal["classification", "detection", "huggingface"]
State = dict[str, Tensor]
T = TypeVar("T")

STAGES = ("patch_embed.", "levels.")  # a detector's file has no layers after these

_BACKBONE, _HUGGINGFACE = "backbone.", "model."
_GAMMA, _LAYER_SCALE = re.compile(r"\.gamma([12])$"), re.compile(r"\.layer_scale([12])$")

# Pre-training files are older than the modules' present names: pattern, replacement.
_RENAMED = (
    (re.compile(r"attn"), "dcn"),
    (re.compile(r"sampling_offsets"), "offset"),
    (re.compile(r"attention_weights"), "mask"),
    (re.compile(r"value_proj"), "input_proj"),
    (re.compile(r"(\.norm1_[qkv]|\.post_norms\.\d+|^fc_norm)\.(weight|bias)$"), r"\1.0.\2"),
)
_CLASSIFIER = {
    "clip.classifier_ln.weight": "fc_norm.0.weight",
    "clip.classifier_ln.bias": "fc_norm.0.bias",
    "clip.classifier.weight": "head.weight",
    "clip.classifier.bias": "head.bias",
}


def load_internimage(
    source: str | Path | Mapping[str, Any], cfg: InternImageConfig, *, stages_only: bool = False
) -> InternImage:
    """Return an InternImage with the weights of a published file, in any of the layouts.

    source: a .safetensors file, any other file that torch.load reads with weights_only=True, or
    what such a file holds. With cfg.num_classes = 0 its `head` is left out. stages_only: load stem
    and stages alone, which is all that a detector's file has; the layers after them keep their
    initial values. Half-precision weights are widened. Keys that are left out are named in the log.

    Raises ValueError naming the keys that are missing, unexpected or of another shape (expected and
    got), or when the file holds more than tensors and plain values.
    """
    content = read_weights(Path(source)) if isinstance(source, str | Path) else source
    state = official_names(tensors_in(content))
    if cfg.num_classes == 0:
        state = _leave_out(state, [name for name in state if name.startswith("head.")])
    if stages_only:
        state = _leave_out(state, [name for name in state if not name.startswith(STAGES)])
    model = InternImage(cfg)
    expected = model.state_dict()
    if stages_only:
        expected = {k: v for k, v in expected.items() if k.startswith(STAGES)}
    _check(state, expected)
    model.load_state_dict(state, strict=not stages_only)
    return model


def to_layout(model: InternImage, layout: Layout) -> dict[str, Any]:
    """Return what a file of this layout holds; the tensors are the model's own, not copies.

    Raises ValueError for an unknown layout.
    """
    state = model.state_dict()
    match layout:
        case "classification":
            return {"model": state}
        case "detection":
            stages = {k: v for k, v in state.items() if k.startswith(STAGES)}
            return {"state_dict": {_BACKBONE + name: value for name, value in stages.items()}}
        case "huggingface":
            return {
                _HUGGINGFACE + _GAMMA.sub(r".layer_scale\1", name): value
                for name, value in state.items()
            }
        case _:
            raise ValueError(
                f"layout: expected classification, detection or huggingface, got {layout!r}"
            )


def save_internimage(model: InternImage, path: str | Path, layout: Layout) -> None:
    """Write the weights beside `path`, then rename: .safetensors for huggingface, else torch.save.

    Raises ValueError when the file's name does not end as its layout requires.
    """
    path = Path(path)
    safe = layout == "huggingface"
    if safe != (path.suffix == ".safetensors"):
        raise ValueError(
            f"path: expected a name that ends in {'.safetensors' if safe else '.pth'} for the "
            f"{layout} layout, got {path.name}"
        )
    content = to_layout(model, layout)
    if safe:
        write_weights(path, content)
        return
    with replaced_atomically(path) as temporary:
        torch.save(content, temporary)


def official_names(state: Mapping[str, T]) -> dict[str, T]:
    """Return what a file has by its names by those of the official classification model.

    Names that are no part of the model are left out, and named in the log.
    """
    if any("mask_token" in name for name in state):
        return _from_pretraining(state)
    if any(name.startswith(_BACKBONE) for name in state):
        return _below(state, _BACKBONE)
    if any(name.startswith(_HUGGINGFACE) for name in state):
        return {_LAYER_SCALE.sub(r".gamma\1", k): v for k, v in _below(state, _HUGGINGFACE).items()}
    return dict(state)


def _below(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the weights below a prefix, without a detector's neck and heads."""
    kept = _leave_out(state, [name for name in state if not name.startswith(prefix)])
    return {name.removeprefix(prefix): value for name, value in kept.items()}


def _from_pretraining(state: Mapping[str, T]) -> dict[str, T]:
    """Return stages, projections and classifier of a joint pre-training file, by present names."""
    kept = {_CLASSIFIER[name]: value for name, value in state.items() if name in _CLASSIFIER}
    left_out = []
    for name, value in state.items():
        ours = ("dcnv3" in name or "clip_projector" in name) and "mm_dcnv3" not in name
        if ours and "ema" not in name:
            new = name.replace("dcnv3.", "")
            for pattern, replacement in _RENAMED:
                new = pattern.sub(replacement, new)
            kept[new] = value
        elif name not in _CLASSIFIER:
            left_out.append(name)
    _log_left_out(left_out)
    return kept


def _leave_out(state: Mapping[str, T], names: list[str]) -> dict[str, T]:
    _log_left_out(names)
    return {name: value for name, value in state.items() if name not in set(names)}


def _log_left_out(names: list[str]) -> None:
    if names:
        logger.info("left out, no part of the model: %s", some(names))


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    both: Set[str] = state.keys() & expected.keys()
    shapes = [
        f"{name}: expected {list(expected[name].shape)}, got {list(state[name].shape)}"
        for name in expected
        if name in both and state[name].shape != expected[name].shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in both],
        "unexpected": [name for name in state if name not in both],
        "of another shape": shapes,
    }
    problems = [f"{kind}: {some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise ValueError("weights do not fit this InternImageConfig; " + "; ".join(problems))
