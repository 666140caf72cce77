"""Checkpoints: a directory a step, of safetensors and JSON files alone, listed in a manifest.

step_00000100/  manifest.json (version, step, size and SHA-256 of every file)
                model/ optimizer/ state/, in each a file a rank: 00001-of-00002.safetensors
latest          a file with the name of the newest one, replaced last; for people and scripts

Older checkpoints have no manifest: their directory holds model.safetensors, optimizer.safetensors
and state.json, which are still read.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.run_encoder import PREFIXES, Which
from m3i_fast.durable_files import digest
from m3i_fast.engine.checkpoint.layout import (
    STATE_SHAPE,
    expect_only,
    missing_file,
    read_manifest,
)
from m3i_fast.engine.checkpoint.shard_files import MANIFEST, PARTS, STATE, SUFFIX, Shards
from m3i_fast.engine.optim.optimizers import Optimizers
from m3i_fast.json_files import read_json

logger = logging.getLogger(__name__)

T = TypeVar("T")
POINTER = "latest"
_NAME = re.compile(r"step_(\d{8})")
_OLD_FILES = (*(f"{part}{SUFFIX}" for part in PARTS), f"{STATE}.json")
_NO_MOMENTS = "none"  # field of a parameter without state: it has had no gradient yet


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The checkpoint in a directory `step_00000000`, which need not be complete."""

    path: Path

    @property
    def step(self) -> int:
        """Return the number of optimiser steps taken."""
        match = _NAME.fullmatch(self.path.name)
        if match is None:
            raise ValueError(f"{self.path}: expected a directory named step_00000000")
        return int(match[1])

    @property
    def is_old(self) -> bool:
        """Return whether the directory has the older layout, without a manifest."""
        return not os.path.lexists(self.path / MANIFEST) and any(
            os.path.lexists(self.path / name) for name in _OLD_FILES
        )

    def manifest(self) -> dict[str, Any]:
        """Read the manifest; raise ValueError naming what is wrong with it."""
        return read_manifest(self.path, self.step)

    def files(self) -> dict[str, dict[str, Any]]:
        """Return size and SHA-256 by file name from the manifest, or {} by name in the old layout.

        Raises ValueError where the directory holds any other file, and FileNotFoundError where it
        lacks one.
        """
        if self.is_old:
            expect_only(self.path, _OLD_FILES)
            return {name: {} for name in _OLD_FILES}
        files: dict[str, dict[str, Any]] = self.manifest()["files"]
        expect_only(self.path, {MANIFEST, *files}, folders=(*PARTS, STATE))
        return files

    def verify(self) -> None:
        """Read every byte; raise ValueError or FileNotFoundError naming the file and the damage."""
        for name, expected in self.files().items():
            path = self.path / name
            if expected and (size := path.stat().st_size) != expected["size"]:
                raise ValueError(f"{path}: damaged: {size} bytes of {expected['size']}")
            if expected and asdict(digest(path)) != expected:
                raise ValueError(f"{path}: damaged: its SHA-256 is not that of the manifest")
        for part in PARTS:  # a header holds the length of its file, so a truncated one is detected
            self.shards(part)
        for path in self._state_paths():
            read_json(path, STATE_SHAPE)

    def damage(self) -> str | None:
        """Return the message of the error that `verify` raises; None where all is good."""
        try:
            self.verify()
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def state(self, rank: int | None = None) -> dict[str, Any]:
        """Return the JSON state of a rank: the loader's position, generators, monitors, config.

        rank: this process's where it is None. A rank that did not save gets the state of the first.
        """
        if rank is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        files = self._state_paths()
        state: dict[str, Any] = read_json(files[rank if rank < len(files) else 0], STATE_SHAPE)
        return state

    def _state_paths(self) -> list[Path]:
        """Return the state files in the order of the ranks, at least one."""
        paths = self._paths(STATE)
        if not paths:
            raise missing_file(self.path / STATE)
        return paths

    def _paths(self, part: str) -> list[Path]:
        """Return the files of "model", "optimizer" or "state" in the order of the ranks."""
        prefix = f"{part}{'.' if self.is_old else '/'}"
        return [self.path / name for name in sorted(self.files()) if name.startswith(prefix)]

    def load_model(self, model: nn.Module) -> None:
        """Load all parameters and buffers, strictly; of a sharded model this rank's shards."""
        shards, targets = self.shards("model"), model.state_dict()
        _expect_same(self.path, "model and checkpoint", targets, shards.sizes)
        shards.read_into(targets)

    def encoder(self, which: Which = "trained") -> dict[str, Tensor]:
        """Return the whole weights of the image encoder, by its own names, on the CPU.

        Raises ValueError where the run has no moving average and it is asked for.
        """
        prefix = PREFIXES[which]
        found = self.shards("model").read(prefix)
        if not found:
            raise ValueError(
                f"{self.path}: expected weights {prefix}*, got none: no term of that run reads a "
                "moving average; leave ,which=ema out"
            )
        return {name.removeprefix(prefix): value for name, value in found.items()}

    def load_optimizer(self, model: nn.Module, optimizer: Optimizers) -> None:
        """Load the optimiser state of every trainable parameter, by name."""
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        shards = self.shards("optimizer")
        fields: dict[str, dict[str, str]] = {}  # parameter's name -> field -> key
        for key in shards.sizes:
            name, _, field = key.rpartition("/")
            keys_by_field = fields.setdefault(name, {})
            if field != _NO_MOMENTS:
                keys_by_field[field] = key
        _expect_same(self.path, "optimizer state and model", fields, named)
        moments = {
            key: _moment(named[name], shards.sizes[key], shards.dtypes[key])
            for name, keys in fields.items()
            for key in keys.values()
        }
        shards.read_into(moments)
        for name, keys in fields.items():
            if keys:
                optimizer.state[named[name]] = {f: moments[key] for f, key in keys.items()}

    def shards(self, part: str) -> Shards:
        """Return the stored tensors of "model" (by name) or "optimizer" (by `NAME/FIELD`)."""
        return Shards(self._paths(part), self.path / part)


def tensors_of(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """Return all tensors that are saved, by `model/NAME` and `optimizer/NAME/FIELD`."""
    model_part, optimizer_part = PARTS
    tensors = {f"{model_part}/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        if not moments and parameter.requires_grad:
            moments = {_NO_MOMENTS: torch.empty(0)}
        for field, tensor in moments.items():
            tensors[f"{optimizer_part}/{name}/{field}"] = tensor
    return tensors


def checkpoints(directory: Path) -> list[Checkpoint]:
    """Return all checkpoints, oldest first, unverified; one in flight has another name."""
    if not directory.is_dir():
        return []
    paths = (path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    return [Checkpoint(path) for path in sorted(paths)]


def latest(
    directory: Path, group: dist.ProcessGroup | None = None, *, up_to: int | None = None
) -> Checkpoint:
    """Return the newest good checkpoint; every byte of it is read, and damaged ones are warned of.

    up_to: consider checkpoints of at most so many steps. With a group all its ranks call this, and
    one of them reads. Raises FileNotFoundError when there is no checkpoint, and ValueError with the
    reason of each when none is good.
    """
    return on_first_rank(group, lambda: _latest(directory, up_to))


def on_first_rank(group: dist.ProcessGroup | None, function: Callable[[], T]) -> T:
    """Return or raise on all ranks of `group` what `function` returns or raises on the first."""
    if group is None:
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _latest(directory: Path, up_to: int | None) -> Checkpoint:
    candidates = [c for c in checkpoints(directory) if up_to is None or c.step <= up_to]
    if not candidates:
        raise FileNotFoundError(f"no checkpoint in {directory}: expected a directory step_00000000")
    reasons: list[str] = []
    for candidate in reversed(candidates):
        reason = candidate.damage()
        if reason is None:
            for skipped in reasons:
                logger.warning("checkpoint skipped, %s is used: %s", candidate.path, skipped)
            return candidate
        reasons.append(reason)
    raise ValueError(f"no good checkpoint in {directory}: " + "; ".join(reasons))


def _moment(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor for a moment: sharded as its parameter, if it has its shape.

    A fused optimiser keeps its step counts on the parameter's device as well.
    """
    if parameter.shape == size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype, device=parameter.device)


def _expect_same(path: Path, what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"{path}: {what} differ in {sorted(a.keys() ^ b.keys())}")
