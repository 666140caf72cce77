"""AdamW, with Muon for the matrices of blocks where asked, and schedules as arrays."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from m3i_fast.engine.schedules import cosine, warmup_cosine


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    lr: float = 1e-3
    """Peak learning rate, for this batch size."""
    final_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_fraction: float = 0.025
    """Share of the steps that warm up linearly (SiameseIM: 40 of 1600 epochs)."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none on parameters of one dimension or less."""
    final_weight_decay: float = 0.05
    """Weight decay at the last step, reached by a cosine."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas (SiameseIM: 0.9, 0.95)."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """What updates the weight matrices of Transformer blocks; AdamW updates all else. muon
    orthogonalises their momentum: more is learnt a step, for 15 small products a matrix."""
    muon_lr: float = 0.02
    """Muon's peak learning rate; it follows lr's schedule."""
    clip_grad_norm: float = 1.0
    """Bound of the global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr: expected > 0, got {self.lr}")
        if not self.muon_lr > 0:
            raise ValueError(f"optim.muon_lr: expected > 0, got {self.muon_lr}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"optim.warmup_fraction: expected 0 to 1, got {self.warmup_fraction}")
        if self.clip_grad_norm < 0:
            raise ValueError(f"optim.clip_grad_norm: expected >= 0, got {self.clip_grad_norm}")

    def warmup_steps(self, num_steps: int) -> int:
        return round(self.warmup_fraction * num_steps)

    def lr_schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        warmup_steps = self.warmup_steps(num_steps)
        return warmup_cosine(
            self.lr, num_steps=num_steps, warmup_steps=warmup_steps, final=self.final_lr
        )

    def weight_decay_schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        return cosine(self.weight_decay, self.final_weight_decay, num_steps=num_steps)


class Optimizers:
    """One or two of torch's optimisers that are stepped, scheduled and saved as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.state: defaultdict[torch.Tensor, Any] = parts[0].state
        for part in parts[1:]:
            part.state = self.state
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> Optimizers:
    """Fused AdamW over the trainable parameters, or Muon and AdamW.

    Norms, biases, scalars, tokens and tables do not decay. A group's learning rate is the
    schedule's times its `lr_scale`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if cfg.matrices == "muon" and _in_block(name, p)]
    by_muon = {id(p) for p in matrices}
    rest = [(name, p) for name, p in named if id(p) not in by_muon]
    decayed = [p for name, p in rest if _decays(name, p)]
    others = [p for name, p in rest if not _decays(name, p)]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": cfg.weight_decay, "decays": True, "lr_scale": 1.0},
            {"params": others, "weight_decay": 0.0, "decays": False, "lr_scale": 1.0},
        ],
        lr=cfg.lr,
        betas=cfg.betas,
        fused=True,
    )
    if not matrices:
        return Optimizers(adamw)
    group = {"params": matrices, "decays": True, "lr_scale": cfg.muon_lr / cfg.lr}
    return Optimizers(
        adamw, torch.optim.Muon([group], lr=cfg.muon_lr, weight_decay=cfg.weight_decay)
    )


def set_schedules(optimizer: Optimizers, *, lr: float, weight_decay: float) -> None:
    """Write this step's values into the groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = weight_decay


def _in_block(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and ".blocks." in f".{name}"


def _decays(name: str, parameter: nn.Parameter) -> bool:
    tables = ("pos_embed", "mask_token", "class_token", "register_tokens", "token_embedding")
    return parameter.ndim > 1 and not any(table in name for table in tables)
