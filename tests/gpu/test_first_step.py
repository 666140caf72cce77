"""The comparison of losses on a GPU with the CPU's, here of the CPU with itself."""

from __future__ import annotations

import pytest
import torch

from m3i_fast.config import TrainConfig
from m3i_fast.engine.train_step import TrainStep
from scripts.gpu.programs import first_step


def test_losses_are_of_the_same_weights_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed draws other weights on a GPU, which a shift stands for here."""
    build, shifts = first_step.build_our_step, iter((0.0, 0.1))

    @torch.no_grad()
    def other_weights(train: TrainConfig) -> TrainStep:
        step, shift = build(train), next(shifts)
        for parameter in step.objective.parameters():
            parameter += shift
        return step

    monkeypatch.setattr(first_step, "build_our_step", other_weights)
    first, second = first_step.losses("cpu", "cpu")
    assert first == second and len(set(first)) == first_step.STEPS
