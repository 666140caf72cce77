"""Copies of one probe that differ in their learning rate, trained together on the same batches.

A parameter of all copies is one tensor, so that they share every matrix product; an optimiser of
torch sees each copy's slice as a parameter of its own. Legend: R copies.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Slices = list[list[nn.Parameter]]  # [R] copies, each with its own parameters


def slices_of(stacked: Sequence[Tensor]) -> Slices:
    """Return each copy's parameters, which share memory with the stacked tensors, [R, ...] each."""
    num_copies = stacked[0].shape[0]
    return [[nn.Parameter(each.detach()[r]) for each in stacked] for r in range(num_copies)]


def set_gradients(slices: Slices, gradients: Sequence[Tensor]) -> None:
    """Hand stacked gradients, [R, ...] each, to the parameters of the copies."""
    for r, parameters in enumerate(slices):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient[r]


def expect_rates(learning_rates: Sequence[float]) -> None:
    """Raise ValueError unless there are learning rates, all of them above 0."""
    if not learning_rates or min(learning_rates) <= 0:
        raise ValueError(
            f"learning_rates: expected one or more, all above 0, got {list(learning_rates)}"
        )
