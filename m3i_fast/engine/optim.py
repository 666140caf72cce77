"""AdamW over two parameter groups, with schedules as arrays."""

from __future__ import annotations

from dataclasses import dataclass

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
    clip_grad_norm: float = 1.0
    """Bound of the global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"optim.lr: expected > 0, got {self.lr}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ValueError(f"optim.warmup_fraction: expected 0 to 1, got {self.warmup_fraction}")
        if self.clip_grad_norm < 0:
            raise ValueError(f"optim.clip_grad_norm: expected >= 0, got {self.clip_grad_norm}")

    def lr_schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        warmup_steps = round(self.warmup_fraction * num_steps)
        return warmup_cosine(
            self.lr, num_steps=num_steps, warmup_steps=warmup_steps, final=self.final_lr
        )

    def weight_decay_schedule(self, num_steps: int) -> np.ndarray:  # [num_steps] fp64
        return cosine(self.weight_decay, self.final_weight_decay, num_steps=num_steps)


def build_optimizer(cfg: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters.

    Group 0 decays, group 1 (norms, biases, scalars, tokens and tables) does not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [(name, p) for name, p in named if _decays(name, p)]
    others = [(name, p) for name, p in named if not _decays(name, p)]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": cfg.weight_decay, "decays": True},
            {"params": others, "weight_decay": 0.0, "decays": False},
        ],
        lr=cfg.lr,
        betas=cfg.betas,
        fused=True,
    )


def set_schedules(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Write this step's values into the groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = weight_decay


def _decays(name: str, parameter: nn.Parameter) -> bool:
    tables = ("pos_embed", "mask_token", "class_token", "register_tokens", "token_embedding")
    return parameter.ndim > 1 and not any(table in name for table in tables)
