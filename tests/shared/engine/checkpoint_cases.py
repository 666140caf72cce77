"""A small model with its optimiser, and checkpoints of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.checkpoint.checkpoints import Checkpoint
from m3i_fast.engine.checkpoint.saver import Saver
from m3i_fast.engine.optim.optimizers import Optimizers, build_optimizer


def make_model(seed: int) -> nn.Module:
    """Weights, frozen ones, and buffers of other types and of no dimension."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    model[1].requires_grad_(False)
    model.add_module("blocks", nn.Linear(2, 2))
    model.register_buffer("seen", torch.tensor(seed))
    model.register_buffer("used", torch.tensor([True, False, seed % 2 == 0]))
    model.register_buffer("rough", torch.randn(3).bfloat16())
    return model


def train(model: nn.Module, optimizer: Optimizers, num_steps: int) -> None:
    for step in range(num_steps):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(
    seed: int, num_steps: int = 3, cfg: OptimConfig | None = None
) -> tuple[nn.Module, Optimizers]:
    model = make_model(seed)
    optimizer = build_optimizer(cfg or OptimConfig(lr=1e-2), model)
    train(model, optimizer, num_steps)
    return model, optimizer


def save(
    directory: Path, step: int, *, seed: int | None = None, keep: int = 2, keep_every: int = 0
) -> Checkpoint:
    """Of a model of the seed `step`, unless another one is given."""
    model, optimizer = trained(step if seed is None else seed)
    with Saver(directory, keep=keep, keep_every=keep_every) as saver:
        saver.save(step=step, model=model, optimizer=optimizer, state={"at": step})
    return Checkpoint(directory / f"step_{step:08d}")


def weights(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    moments = {
        f"{name}/{field}": tensor
        for name, parameter in model.named_parameters()
        for field, tensor in optimizer.state.get(parameter, {}).items()
    }
    return {name: t.clone() for name, t in {**model.state_dict(), **moments}.items()}


def loaded(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What a fresh model has after loading."""
    model, optimizer = trained(99, num_steps=0)
    checkpoint.load_model(model)
    checkpoint.load_optimizer(model, optimizer)
    return weights(model, optimizer)


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
