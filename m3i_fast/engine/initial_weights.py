"""Weights that a run begins from: read, fitted to its image encoder, copied in and written down."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from m3i_fast.config import TrainConfig, ViTConfig, differences
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.durable_files import digest, write_atomically
from m3i_fast.engine.checkpoint import checkpoints as checkpoint
from m3i_fast.engine.checkpoint.shard_files import MANIFEST
from m3i_fast.engine.parallel.local_shards import is_sharded
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.export.huggingface.read_folder import read_folder
from m3i_fast.export.vit_names import Family, Renamed
from m3i_fast.export.vit_weights import FittedWeights, fitted, vit_weights
from m3i_fast.export.weight_files import read_weights, some, tensors_in
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.terms.base import copy_state

logger = logging.getLogger(__name__)

INIT_FILE = "init.json"  # in a run's directory
_ENCODER = "encoder."  # prefix of the image encoder's weights in the objective
_BLOCK = re.compile(r"\bblocks\.\d+\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialWeights:
    """The weights that a run began from, and what was made of them."""

    source: str
    """As `TrainConfig.init` names it."""
    sha256: str
    """Of the file, or of the digests and names of several; of a run, of a checkpoint's manifest."""
    weights: FittedWeights

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (weight, where it is from, what was done to it), a row for those of all blocks."""
        found = self.weights
        taken = [(n, found.sources[n], found.changes.get(n, "as it is")) for n in found.tensors]
        taken += [(name, "-", "new, with its initial values") for name in found.new]
        taken += [("-", name, "left out") for name in found.left_out]
        general = [tuple(_BLOCK.sub("blocks.*.", cell) for cell in row) for row in taken]
        return cast(list[tuple[str, str, str]], list(dict.fromkeys(general)))

    def save(self, path: Path) -> None:
        """Write all of it but the values of the weights as JSON."""
        found = self.weights
        content = {
            "source": self.source,
            "sha256": self.sha256,
            "nearest_architecture": found.architecture,
            "taken": {
                name: {"from": found.sources[name], "change": found.changes.get(name)}
                for name in found.tensors
            },
            "new": found.new,
            "left_out": found.left_out,
        }
        write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def begin_from_weights(
    cfg: TrainConfig, objective: MutualInformation, world: World
) -> InitialWeights | None:
    """Copy the weights that cfg.init names into the image encoder and its EMA; None without.

    Sharded or not. Every rank reads the file; nothing is drawn. Raises FileNotFoundError where
    there is none, and ValueError where it does not fit cfg.vision or ranks have different ones.
    """
    if not cfg.init:
        return None
    initial = read_initial(cfg.init, cfg.vision)
    if len(found := set(world.gather(initial.sha256))) > 1:
        raise ValueError(f"--init {cfg.init}: expected one file on all ranks, got {len(found)}")
    targets = objective.encoder.state_dict()
    for name, value in initial.weights.tensors.items():
        _copy(targets[name], value)
    with torch.no_grad():
        for average, online in objective.momentum_pairs():
            copy_state(average, online)
    if initial.weights.new:
        logger.warning(
            "--init %s has no %s: the features are not those of its model",
            *(cfg.init, some(initial.weights.new)),
        )
    return initial


def read_initial(spec: str, vision: VisionConfig) -> InitialWeights:
    """Read the weights that `spec` names, SCHEME:PATH, for an image encoder of `vision`."""
    scheme, _, place = spec.partition(":")
    path = Path(place)
    try:
        if scheme == "run":
            newest = checkpoint.latest(path / "checkpoints")
            sha256, weights = digest(newest.path / MANIFEST).sha256, _of_run(path, newest, vision)
        elif scheme == "hf":
            assert isinstance(vision, ViTConfig)  # TrainConfig.conflicts
            weights, sha256 = read_folder(path, vision)
        else:
            assert isinstance(vision, ViTConfig)
            state = tensors_in(read_weights(path))
            sha256, weights = digest(path).sha256, vit_weights(state, cast(Family, scheme), vision)
    except ValueError as error:
        raise ValueError(f"--init {spec}: {error}") from error
    return InitialWeights(source=spec, sha256=sha256, weights=weights)


def _of_run(run: Path, newest: checkpoint.Checkpoint, vision: VisionConfig) -> FittedWeights:
    """Return the weights of the image encoder of one of our runs."""
    of_run = TrainConfig.load(run / "config.json").vision
    saved = newest.shards("model").read(_ENCODER)
    state = {name.removeprefix(_ENCODER): value for name, value in saved.items()}
    sources = {name: f"{_ENCODER}{name}" for name in state}
    if isinstance(of_run, ViTConfig) and isinstance(vision, ViTConfig):
        return fitted(Renamed(tensors=state, sources=sources), of_run, vision, f"that of {run}")
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
