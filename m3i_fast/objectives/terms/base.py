"""What every term is: a module that turns a step into -log P(z | z_hat)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, BlockLayers, reset_children
from m3i_fast.objectives.losses.builders import build_loss
from m3i_fast.objectives.monitors import feature_std, mean_cosine
from m3i_fast.objectives.step_context import Monitor, Seen


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What terms have to know of the rest of the model."""

    vision: VisionConfig
    text: TextConfig
    num_classes: int
    target_dim: Mapping[str, int]
    """Width of a token of the momentum and the frozen encoder, where there is one."""
    summary_dim: Mapping[str, int]
    """Width of their summaries."""
    process_group: dist.ProcessGroup | None = None
    """The ranks that share a batch."""
    layers: BlockLayers = TORCH_LAYERS
    """Parts of the Transformer blocks."""


class TermModule(nn.Module, ABC):
    """One term of the sum."""

    def __init__(self, term: Term, cfg: ObjectiveConfig, dim: int, sizes: Sizes) -> None:
        super().__init__()
        self.term, self.process_group = term, sizes.process_group
        self.loss = build_loss(term, cfg, dim, sizes.process_group)

    def reset_parameters(self) -> None:
        """Initialise everything, as after `to_empty`; what follows by EMA starts as a copy."""
        pairs = dict(self.momentum_pairs())
        reset_children(self, but=pairs)
        self.reset_own_parameters()
        for average, online in pairs.items():
            copy_state(average, online)

    def reset_own_parameters(self) -> None:
        """Initialise what belongs to no submodule; a term that has such overrides this."""

    def momentum_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(average, online): what follows the online modules by EMA."""
        yield from ()

    @abstractmethod
    def forward(self, seen: Seen, monitor: Monitor | None) -> tuple[Tensor, Tensor | int]:
        """-log P [] and its number of members: rows with a target, dense ones asked, images."""


def follower(module: nn.Module, sizes: Sizes) -> nn.Module:
    """A copy that an EMA moves; its batch norms use the batch's statistics, as in training."""
    group = sizes.process_group
    return copy.deepcopy(module, {id(group): group}).requires_grad_(False)


@torch.no_grad()
def copy_state(average: nn.Module, online: nn.Module) -> None:
    """Parameters and buffers of `online` into a copy of it, in place."""
    targets, sources = ((*m.parameters(), *m.buffers()) for m in (average, online))
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@torch.no_grad()
def watch(monitor: Monitor | None, name: str, *, z_hat: Tensor | None, z: Tensor) -> None:
    """Log how far the targets are spread, and how near predictions are to them."""
    if monitor is not None:
        monitor(f"{name}_std", feature_std(z.detach()))
        if z_hat is not None:
            monitor(f"{name}_cosine", mean_cosine(z_hat.detach(), z.detach()))
