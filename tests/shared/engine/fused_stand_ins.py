"""Modules that answer to the names of Apex and Transformer Engine, for machines without them.

Their optimisers take the arguments of the real ones, no others, and behave as those in what matters
here: step counts in the groups, a zero_grad without argument, FusedLAMB's own clipping.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch


class GroupSteps(torch.optim.Optimizer, ABC):
    """Moments in the state, the count of steps in the group."""

    seen: dict[str, Any]

    def __init__(self, params: Any, **arguments: Any) -> None:
        type(self).seen = arguments
        super().__init__(params, {k: arguments[k] for k in ("lr", "betas", "eps", "weight_decay")})

    def zero_grad(self) -> None:  # type: ignore[override]
        raise AssertionError("the engine sets the gradients to none itself")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        shrink = self.shrink()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self.change(p, self.moments(p, p.grad / shrink, group), group)

    def shrink(self) -> float:
        return 1.0

    def moments(self, p: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        state = self.state[p]
        if len(state) == 0:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        (b1, b2), t = group["betas"], group["step"]
        state["exp_avg"].mul_(b1).add_(grad, alpha=1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        root = (state["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"]
        return state["exp_avg"] / (1 - b1**t) / root

    @abstractmethod
    def change(self, p: torch.Tensor, update: torch.Tensor, group: dict[str, Any]) -> None: ...


class FusedAdam(GroupSteps):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, **arguments)

    def change(self, p: torch.Tensor, update: torch.Tensor, group: dict[str, Any]) -> None:
        p.sub_(update + group["weight_decay"] * p, alpha=group["lr"])


class FusedLAMB(GroupSteps):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, **arguments)

    def shrink(self) -> float:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        bound: float = self.seen["max_grad_norm"]
        return norm / bound if norm > bound else 1.0

    def change(self, p: torch.Tensor, update: torch.Tensor, group: dict[str, Any]) -> None:
        decay, ratio = group["weight_decay"], 1.0
        update = update + decay * p
        if decay and float(p.norm()) and float(update.norm()):
            ratio = float(p.norm() / update.norm())
        p.sub_(update, alpha=group["lr"] * ratio)


def put_in_place(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make modules of these names importable; the optimisers are in each."""
    for name in names:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        module.FusedAdam, module.FusedLAMB = FusedAdam, FusedLAMB  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)


def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, "amp_C", "apex", "apex.optimizers")


def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformer_engine"
    put_in_place(monkeypatch, name, f"{name}.pytorch", f"{name}.pytorch.optimizers")
