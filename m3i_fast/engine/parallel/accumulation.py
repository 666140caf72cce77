"""Gradient accumulation: a step adds up the gradients of several batches, for terms that add up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.config import TrainConfig
from m3i_fast.config.losses import LOSSES

_INSTEAD = "; --parallel.chunk has the memory of a part of the batch and the losses of all of it"


def expect_additive(cfg: TrainConfig, model: nn.Module) -> None:
    """ValueError where a loss of the whole batch is not the mean of its parts' losses."""
    got = f"got parallel.accumulate = {cfg.parallel.accumulate}"
    if cfg.parallel.accumulate == 1:
        return
    for term in cfg.objective.active_terms:
        if not LOSSES[term.loss_key].independent:
            raise ValueError(
                f"parallel.accumulate: expected 1 with the term {term.name!r} "
                f"({', '.join(term.loss_key)}), whose loss is of all rows together, {got}{_INSTEAD}"
            )
        if term.mean == "members" or term.standardise == "batch":
            got_term = "mean = members" if term.mean == "members" else "standardise = batch"
            raise ValueError(
                f"parallel.accumulate: expected 1 with {got_term} of the term {term.name!r}, which "
                f"is of the rows of one batch, {got}{_INSTEAD}"
            )
    if cfg.objective.balance.mode == "gradient_norm":
        raise ValueError(
            "parallel.accumulate: expected 1 with objective.balance.mode = gradient_norm, which "
            f"measures one batch, {got}{_INSTEAD}"
        )
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"parallel.accumulate: expected 1 with batch norm ({name}), whose statistics are "
                f"of a batch, {got}{_INSTEAD}"
            )


@contextmanager
def reduced(model: nn.Module, is_last: bool) -> Iterator[None]:
    """A forward and backward pass; in the last, ranks reduce the gradients of all of them."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    yield


def over_batches(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of a step from those of its batches: means, and sums of members."""
    if len(found) == 1:
        return dict(found[0])
    joined = {}
    for name in found[-1]:
        values = torch.stack([metrics[name] for metrics in found if name in metrics])
        joined[name] = values.sum(0) if name.startswith("members/") else values.mean(0)
    return joined
