"""The whole training step of one version, as a process of `m3i-fast bench compare step` takes it.

Run by its path, the same file for both versions. Of a version's package it needs what NEEDS lists:

- `recipes()[NAME]()`, a config whose fields `data.batch_size`, `precision`, `backend`, `device` and
  `compile` `dataclasses.replace` sets, and whose `to_json()` writes it;
- `Batch`, with the fields of the version that compares;
- `capabilities_of(device)`, `gemm_shapes(config)` and `resolve_precision(capabilities, shapes,
  precision, backend, compiled=False)`, whose result has a `compute_dtype`;
- `build_train_step(config, World(device), arithmetic)`, whose result, called with a batch, takes a
  step and returns metrics with `loss/total`.

All versions since 2026-11-29 have them; another one is refused with what it lacks.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from types import SimpleNamespace
from typing import Any

import torch

NEEDS = {
    "m3i_fast.recipes": ("recipes",),
    "m3i_fast.pipelines.batch": ("Batch",),
    "m3i_fast.costs.gemm_shapes": ("gemm_shapes",),
    "m3i_fast.engine.parallel.ranks": ("World",),
    "m3i_fast.engine.precision.arithmetic": ("capabilities_of", "resolve_precision"),
    "m3i_fast.engine.train_step": ("build_train_step",),
}


class MissingError(Exception):
    """Tells what this version does not have of what is asked of it."""


def prepare(
    recipe: str, batch_file: str, num_first: int
) -> tuple[Callable[[], object], dict[str, Any]]:
    """Take the first steps of a run; return a call that takes the next, and what they were.

    batch_file: fields of a batch by name, as torch.save wrote them. Each step has the same views
    and captions at the next positions of the run, so that its masks are drawn anew. Raises
    MissingError for all of NEEDS that this version lacks, another batch or an unknown recipe.
    """
    package = _needed()
    if recipe not in package.recipes():
        known = ", ".join(package.recipes())
        raise MissingError(f"expected a recipe {recipe}, this version has {known}")
    batch = _read_batch(package.Batch, batch_file)
    device = torch.device("cpu")
    train = package.recipes()[recipe]()
    data = replace(train.data, batch_size=batch.batch_size)
    train = replace(train, data=data, device="cpu", compile=False)
    arithmetic = package.resolve_precision(
        package.capabilities_of(device),
        package.gemm_shapes(train),
        train.precision,
        train.backend,
        compiled=False,
    )
    step = package.build_train_step(train, package.World(device), arithmetic)
    taken = 0

    def take() -> torch.Tensor:  # []
        nonlocal taken
        position = batch.position + taken * batch.batch_size
        taken += 1
        loss: torch.Tensor = step(replace(batch, position=position))["loss/total"]
        return loss

    losses, milliseconds = [], []
    for _ in range(num_first):
        begun = time.perf_counter()
        losses.append(float(take()))
        milliseconds.append((time.perf_counter() - begun) * 1e3)
    said = {"config": train.to_json(), "losses": losses, "ms": min(milliseconds)}
    return take, said | {"dtype": str(arithmetic.compute_dtype).removeprefix("torch.")}


def _needed() -> SimpleNamespace:
    """Import what NEEDS lists. Raises MissingError that names all that is not there."""
    found, missing = {}, []
    for module, names in NEEDS.items():
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError:
            loaded = None
        for name in names:
            if hasattr(loaded, name):
                found[name] = getattr(loaded, name)
            else:
                missing.append(f"{module}.{name}")
    if missing:
        raise MissingError(f"expected {', '.join(missing)}, which this version does not have")
    return SimpleNamespace(**found)


def _read_batch(kind: Any, file: str) -> Any:
    values = torch.load(file, weights_only=True)
    expected = {field.name for field in fields(kind)}
    asked = {f.name for f in fields(kind) if f.default is MISSING is f.default_factory}
    if not asked <= values.keys() <= expected:
        raise MissingError(
            f"m3i_fast.pipelines.batch.Batch: expected the fields {', '.join(sorted(values))}, "
            f"this version's are {', '.join(sorted(expected))}"
        )
    return kind(**values)
