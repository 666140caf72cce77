"""Checkpoints: a directory a step, safetensors and JSON only, written beside and renamed.

step_00000100/  model.safetensors  optimizer.safetensors  state.json
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from m3i_fast.engine.optim import Optimizers
from m3i_fast.storage import directory_atomically

_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        match = _NAME.fullmatch(self.path.name)
        if match is None:
            raise ValueError(f"{self.path}: expected a directory named step_00000000")
        return int(match[1])

    def state(self) -> dict[str, Any]:
        """The JSON state: the loader's position."""
        return json.loads((self.path / "state.json").read_text())

    def load_model(self, model: nn.Module) -> None:
        """Load all parameters and buffers, strictly."""
        model.load_state_dict(_read(self.path / "model.safetensors"))

    def load_optimizer(self, model: nn.Module, optimizer: Optimizers) -> None:
        """Load the moments of every trainable parameter, by name."""
        saved = _read(self.path / "optimizer.safetensors")
        entries: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in saved.items():
            name, _, field = key.rpartition("/")
            entries.setdefault(name, {})[field] = tensor
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if entries.keys() != named.keys():
            differing = sorted(entries.keys() ^ named.keys())
            raise ValueError(f"{self.path}: optimizer state and model differ in {differing}")
        for name, parameter in named.items():
            # A fused optimiser keeps its step counts on the parameter's device as well.
            optimizer.state[parameter] = {
                field: tensor.to(parameter.device) for field, tensor in entries[name].items()
            }


def save(
    directory: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizers,
    state: dict[str, Any],
    keep: int,
) -> Checkpoint:
    """Write one checkpoint and delete all but the newest `keep`.

    An error leaves the older ones as they were.
    """
    path = directory / f"step_{step:08d}"
    if path.exists():
        return Checkpoint(path)
    moments = {
        f"{name}/{field}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for field, tensor in optimizer.state.get(parameter, {}).items()
    }
    with directory_atomically(path) as temporary:
        save_file(
            {k: v.contiguous() for k, v in model.state_dict().items()},
            temporary / "model.safetensors",
        )
        save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
    for old in checkpoints(directory)[:-keep]:
        shutil.rmtree(old.path)
    return Checkpoint(path)


def checkpoints(directory: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first; what is still being written has another name."""
    if not directory.is_dir():
        return []
    paths = (path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    return [Checkpoint(path) for path in sorted(paths)]


def latest(directory: Path) -> Checkpoint:
    """The newest checkpoint. Raises FileNotFoundError when there is none."""
    found = checkpoints(directory)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {directory}: expected a directory step_00000000")
    return found[-1]


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing; the checkpoint is not whole") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged: {error}") from None
