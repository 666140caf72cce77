"""Gradient accumulation: one step over several batches, for losses that are means of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.losses import LOSSES

_INSTEAD = "; set --parallel.chunk, which computes losses over the whole batch in as little memory"
_SMALLER = "; set a smaller --data.max-tokens-per-batch, or more ranks"


def expect_additive(cfg: TrainConfig, model: nn.Module) -> None:
    """Raise ValueError where the loss of a batch is not the mean of the losses of its parts.

    The error names `parallel.accumulate` and the term, balance or batch norm that needs all rows.
    """
    got = f"got parallel.accumulate = {cfg.parallel.accumulate}"
    got += _SMALLER if cfg.data.any_shape else _INSTEAD
    if cfg.parallel.accumulate == 1:
        return
    if reason := needs_whole_batch(cfg):
        raise ValueError(f"parallel.accumulate: expected 1 with {reason}, {got}")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"parallel.accumulate: expected 1 with batch norm ({name}), whose statistics span "
                f"a batch, {got}"
            )


def needs_whole_batch(cfg: TrainConfig) -> str:
    """Return which part of the objective needs all rows of a batch, and why; empty for none."""
    for term in cfg.objective.active_terms:
        if not LOSSES[term.loss_key].independent:
            return (
                f"the term {term.name!r} ({', '.join(term.loss_key)}), whose loss compares all rows"
            )
        if term.mean == "members" or term.standardise == "batch":
            got = "mean = members" if term.mean == "members" else "standardise = batch"
            return f"{got} of the term {term.name!r}, which depends on all rows of a batch"
    if cfg.objective.balance.mode == "gradient_norm":
        return "objective.balance.mode = gradient_norm, which measures one batch"
    return ""


@contextmanager
def gradient_sync(model: nn.Module, is_last: bool) -> Iterator[None]:
    """Enclose a forward and backward pass; gradients are all-reduced in the last one alone."""
    if isinstance(model, DistributedDataParallel) and not is_last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
    yield


def merge_batch_metrics(of_batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the metrics of a step's batches: means, but sums of `members/`."""
    if len(of_batches) == 1:
        return dict(of_batches[0])
    merged = {}
    for name in dict.fromkeys(chain(of_batches[-1], *of_batches)):
        values = torch.stack([metrics[name] for metrics in of_batches if name in metrics])
        merged[name] = values.sum(0) if name.startswith("members/") else values.mean(0)
    return merged
