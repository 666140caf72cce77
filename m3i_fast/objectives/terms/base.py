"""The base class of terms, modules that compute -log P(z | z_hat) of a step."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective.losses import LOSSES
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers
from m3i_fast.models.transformer.layers import reset_children
from m3i_fast.objectives.losses.builders import build_loss
from m3i_fast.objectives.monitors import feature_std, mean_cosine
from m3i_fast.objectives.step_context import Monitor, StepContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Sizes and settings of the rest of the model that terms are built with."""

    vision: VisionConfig
    text: TextConfig
    num_classes: int
    target_dim: Mapping[str, int]
    """Width of a token of the target encoders in use, by momentum and frozen."""
    summary_dim: Mapping[str, int]
    """Width of a token of their summaries."""
    columns: tuple[ColumnConfig, ...] = ()
    """Named columns of the data."""
    process_group: dist.ProcessGroup | None = None
    """The ranks that share a batch."""
    layers: BlockLayers = TORCH_LAYERS
    """Constructors of the Transformer blocks' modules."""

    def column_of(self, term: Term) -> ColumnConfig:
        """Return the column that a term names; ValueError where the data have none of that kind."""
        wanted = term.kind.column
        for column in self.columns:
            if column.name == term.column and column.kind == wanted:
                return column
        there = ", ".join(f"{c.name} ({c.kind})" for c in self.columns) or "none"
        raise ValueError(
            f"term {term.name!r}: column: expected a column of {wanted} of the data, which have "
            f"{there}, got {term.column!r}"
        )


class TermModule(nn.Module, ABC):
    """One term of the sum, with the parameters that only it uses."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, dim: int, sizes: Sizes) -> None:
        super().__init__()
        self.term, self.process_group = term, sizes.process_group
        self.loss = build_loss(term, cfg, dim, sizes.process_group)

    def reset_parameters(self) -> None:
        """Initialise everything, as after `to_empty`; EMA modules start as copies."""
        pairs = dict(self.momentum_pairs())
        reset_children(self, but=pairs)
        self.reset_own_parameters()
        for average, online in pairs.items():
            copy_state(average, online)

    def reset_own_parameters(self) -> None:
        """Initialise the parameters that belong to no submodule; overridden by terms with any."""

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Yield (average, online) of each module that follows another by EMA."""
        yield from ()

    @abstractmethod
    def forward(self, step: StepContext, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        """Return -log P, [], and the number of rows or images that it is about.

        Labels count rows with a target, dense terms the images they predict from, the others all
        images. monitor: logs the term's monitors; None on steps that are not logged.
        """

    def weigh(self, value: Tensor, step: StepContext) -> Tensor:  # [] -> []
        """Return the term's loss times the batch's weight in its step (`BatchWeight`)."""
        over_ranks = LOSSES[self.term.loss_key].over_ranks
        return weighted(step.weight.all_rows if over_ranks else step.weight.own_rows, value)

    def counts(self, step: StepContext) -> dict[str, Any]:
        """Return the argument `counts` for a loss that takes it, where ranks have unequal ones."""
        takes_counts = step.weight.counts and LOSSES[self.term.loss_key].takes_counts
        return {"counts": step.weight.counts} if takes_counts else {}


def weighted(weight: Tensor | float, value: Tensor) -> Tensor:  # [], [] -> []
    """Return weight * value, the value itself for a weight of 1."""
    return value if isinstance(weight, float) and weight == 1.0 else weight * value


def momentum_copy(module: nn.Module, sizes: Sizes) -> nn.Module:
    """Copy a module for an EMA to update; its batch norms use the batch's statistics."""
    group = sizes.process_group
    return copy.deepcopy(module, {id(group): group}).requires_grad_(False)


@torch.no_grad()
def copy_state(average: nn.Module, online: nn.Module) -> None:
    """Copy parameters and buffers of `online` into a copy of it, in place."""
    targets, sources = ((*m.parameters(), *m.buffers()) for m in (average, online))
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@torch.no_grad()
def log_spread(monitor: Monitor | None, name: str, *, z_hat: Tensor | None, z: Tensor) -> None:
    """Log the spread of targets as `NAME_std` and their cosine with predictions as `NAME_cosine`.

    z_hat, z: [..., D]; without predictions the spread alone.
    """
    if monitor is not None:
        monitor(f"{name}_std", feature_std(z.detach()))
        if z_hat is not None:
            monitor(f"{name}_cosine", mean_cosine(z_hat.detach(), z.detach()))
