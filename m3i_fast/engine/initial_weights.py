"""Weights that a run begins from: read, fitted to its encoders, copied in and written down."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig, ViTConfig, differences
from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.run_encoder import NamedEncoder, expect_run
from m3i_fast.durable_files import digest, write_atomically
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.shard_files import MANIFEST
from m3i_fast.engine.parallel.local_shards import is_sharded
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.export import open_clip_weights
from m3i_fast.export.huggingface.read_folder import read_folder
from m3i_fast.export.internimage_weights import internimage_weights
from m3i_fast.export.timm import described_by_timm
from m3i_fast.export.vit_names import Family, Renamed
from m3i_fast.export.vit_weights import FittedWeights, fitted, fold_pixel_statistics, vit_weights
from m3i_fast.export.weight_files import read_weights, some, tensors_in
from m3i_fast.json_files import read_json
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms import Caption
from m3i_fast.objectives.terms.base import copy_state
from m3i_fast.pipelines.optional_imports import require

logger = logging.getLogger(__name__)

INIT_FILE = "init.json"  # in a run's directory
_TEXT = "text_encoder."  # what the text encoder's are told by
_FETCHED_BY = {
    "timm": "; nothing is downloaded: to make a folder NAME of a model of timm's, type python -c "
    "\"import timm; timm.models.save_for_hf(timm.create_model('NAME', pretrained=True), 'NAME')\"",
    "hf": "; nothing is downloaded: to make a folder NAME of a model on the hub, type hf download "
    "NAME --local-dir NAME",
}
_BLOCK = re.compile(r"\bblocks\.\d+\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeights:
    """The weights that a run began from, and what was made of them."""

    source: str
    """As `TrainConfig.init` names it."""
    sha256: str
    """Of the file, or of the digests and names of several; of a run, of a checkpoint's manifest."""
    weights: FittedWeights
    text: FittedWeights | None = None
    """Those of the text encoder, of a source that has a text tower as ours."""
    without_text: str = ""
    """Why a text tower of the source was left out."""

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (weight, where it is from, what was done to it), a row for those of all blocks."""
        taken = _rows(self.weights, "")
        if self.text is not None:
            taken += _rows(self.text, _TEXT)
        if self.without_text:
            taken.append(("-", "text tower", f"left out: {self.without_text}"))
        general = [tuple(_BLOCK.sub("blocks.*.", cell) for cell in row) for row in taken]
        return cast(list[tuple[str, str, str]], list(dict.fromkeys(general)))

    def save(self, path: Path) -> None:
        """Write all of it but the values of the weights as JSON."""
        content = {
            "source": self.source,
            "sha256": self.sha256,
            "nearest_architecture": self.weights.architecture,
            **_tree(self.weights),
        }
        if self.text is not None:
            content["text"] = _tree(self.text)
        if self.without_text:
            content["without_text"] = self.without_text
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _rows(found: FittedWeights, prefix: str) -> list[tuple[str, str, str]]:
    rows = [(f"{prefix}{n}", found.sources[n], _change(found, n)) for n in found.tensors]
    rows += [(f"{prefix}{name}", "-", "new, with its initial values") for name in found.new]
    rows += [("-", name, "left out") for name in found.left_out]
    return rows


def _change(found: FittedWeights, name: str) -> str:
    return found.changes.get(name, "as it is")


def _tree(found: FittedWeights) -> dict[str, Any]:
    taken = {
        name: {"from": found.sources[name], "change": found.changes.get(name)}
        for name in found.tensors
    }
    return {"taken": taken, "new": found.new, "left_out": found.left_out}


def begin_from_weights(
    cfg: TrainConfig, objective: MutualInformation, world: World
) -> InitialWeights | None:
    """Copy the weights that cfg.init names into the encoders and the image encoder's EMA.

    Sharded or not. Every rank reads the file; nothing is drawn. None without cfg.init. Raises
    FileNotFoundError where there is none, and ValueError where it does not fit cfg.vision or ranks
    have different ones, or where a text tower that was asked for (`read_initial`) does not fit.
    """
    if not cfg.init:
        return None
    captions = objective.terms_of(Caption)
    initial = read_initial(cfg.init, cfg.vision, cfg.text if captions else None)
    if len(found := set(world.gather(initial.sha256))) > 1:
        raise ValueError(f"--init {cfg.init}: expected one file on all ranks, got {len(found)}")
    _copy_all(objective.encoder, initial.weights)
    if initial.text is not None:
        for term in captions:
            _copy_all(term.text_encoder, initial.text)
    with torch.no_grad():
        for average, online in objective.copies():
            copy_state(average, online)
    if captions and initial.without_text:
        logger.warning(
            "--init %s: the text encoder begins from its initial values: %s",
            *(cfg.init, initial.without_text),
        )
    if initial.weights.new:
        logger.warning(
            "--init %s has no %s: the features are not those of its model",
            *(cfg.init, some(initial.weights.new)),
        )
    return initial


def read_initial(spec: str, vision: VisionConfig, text: TextConfig | None = None) -> InitialWeights:
    """Read the weights that `spec` names, SCHEME:PATH, for an image encoder of `vision`.

    text: of the text encoder; None where there is none. One that is causal asks for the text tower
    of the source: ValueError where that does not fit it. A source may have none.
    """
    scheme, _, place = spec.partition(":")
    path = Path(place)
    try:
        if scheme == "run":
            named = NamedEncoder.of(place)
            expect_run(named.run)
            newest = checkpoint.latest(named.run / "checkpoints")
            return _initial(spec, newest.path / MANIFEST, _of_run(named, newest, vision))
        if scheme == "open_clip":
            return _of_open_clip(spec, path, vision, text)
        if scheme == "hf":
            assert isinstance(vision, ViTConfig)  # TrainConfig.conflicts
            found = read_folder(path, vision, text)
            _expect_asked(found.without_text, text)
            return InitialWeights(
                source=spec,
                sha256=found.sha256,
                weights=found.image,
                text=found.text,
                without_text=found.without_text,
            )
        if scheme == "timm" and path.is_dir():
            return _of_timm_folder(spec, path, vision)
        state = tensors_in(read_weights(path))
        if scheme == "internimage":
            assert isinstance(vision, InternImageConfig)  # TrainConfig.conflicts
            return _initial(spec, path, internimage_weights(state, vision))
        assert isinstance(vision, ViTConfig)
        return _initial(spec, path, vit_weights(state, cast(Family, scheme), vision))
    except FileNotFoundError as error:
        how = _FETCHED_BY.get(scheme, "").replace("NAME", place)
        raise FileNotFoundError(f"--init {spec}: {error}{how}") from error
    except ValueError as error:
        raise ValueError(f"--init {spec}: {error}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(  # whatever a field of another type leads to
            f"--init {spec}: expected fields and tensors as the model's own program writes them, "
            f"got others in {path} ({type(error).__name__}: {error}): write it anew"
        ) from error


def _initial(spec: str, file: Path, weights: FittedWeights) -> InitialWeights:
    return InitialWeights(source=spec, sha256=digest(file).sha256, weights=weights)


def _of_timm_folder(spec: str, folder: Path, vision: VisionConfig) -> InitialWeights:
    """Return the weights of a folder of timm's (`save_for_hf`), for pixels as it has them.

    Heads, GELU and the norms' eps are those of the model that timm builds by the folder's config.
    """
    assert isinstance(vision, ViTConfig)
    require("timm", extra="timm")
    config = read_json(folder / "config.json", {"architecture": str, "model_args?": dict})
    pixels = config.get("pretrained_cfg", config)
    if missing := {"mean", "std"} - pixels.keys():
        raise ValueError(
            f"expected mean and std of pixels in {folder / 'config.json'}, got no {min(missing)}"
        )
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    described = described_by_timm(config["architecture"], **config.get("model_args", {}))
    weights = vit_weights(tensors_in(read_weights(file)), "timm", vision, described)
    fold_pixel_statistics(weights, pixels["mean"], pixels["std"])
    return _initial(spec, file, weights)


def _of_open_clip(
    spec: str, path: Path, vision: VisionConfig, text: TextConfig | None
) -> InitialWeights:
    """Return the weights of a model of open_clip, with its text tower where ours is the same."""
    assert isinstance(vision, ViTConfig)
    file = open_clip_weights.read_open_clip(path)
    if "timm_model_name" in file.config.get("vision_cfg", {}):
        require("timm", extra="timm")
    initial = _initial(spec, file.path, open_clip_weights.image_weights(file, vision))
    if text is None:
        return replace(initial, without_text="the run has no captions")
    if not open_clip_weights.has_text(file):
        return replace(initial, without_text="the file has no text tower")
    try:
        return replace(initial, text=open_clip_weights.text_weights(file, text))
    except ValueError as error:
        _expect_asked(str(error), text)
        return replace(initial, without_text=str(error))


def _expect_asked(without_text: str, text: TextConfig | None) -> None:
    """Raise ValueError where a text tower was asked for and there is a reason against it."""
    if without_text and text is not None and text.attention == "causal":
        raise ValueError(
            f"the text tower does not fit: {without_text}; to begin with a text encoder of initial "
            "values give --text.attention bidirectional"
        )


def _of_run(
    named: NamedEncoder, newest: checkpoint.Checkpoint, vision: VisionConfig
) -> FittedWeights:
    """Return the weights of the image encoder of one of our runs."""
    of_run = TrainConfig.load(named.run / "config.json").vision
    state = newest.encoder(named.which)
    sources = {name: f"{named.prefix}{name}" for name in state}
    if isinstance(of_run, ViTConfig) and isinstance(vision, ViTConfig):
        return fitted(
            Renamed(tensors=state, sources=sources), of_run, vision, f"that of {named.run}"
        )
    with torch.device("meta"):
        expected = _shapes(build_encoder(vision))
    if {name: value.shape for name, value in state.items()} != expected:
        raise ValueError(
            f"expected weights for the run's {type(vision).__name__}, got others (theirs != ours): "
            + "; ".join(differences(of_run, vision))
        )
    return FittedWeights(tensors=state, sources=sources)


def _shapes(encoder: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in encoder.state_dict().items()}


def _copy_all(module: nn.Module, weights: FittedWeights) -> None:
    targets = module.state_dict()
    for name, value in weights.tensors.items():
        _copy(targets[name], value)


@torch.no_grad()
def _copy(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, of which this rank takes its part."""
    if not is_sharded(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    whole = value.to(target.device)
    placed = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(placed.to_local())
