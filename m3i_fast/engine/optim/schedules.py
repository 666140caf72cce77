"""Schedules as arrays indexed by step, known before the first: a resume needs only the step."""

from __future__ import annotations

import numpy as np

from m3i_fast.config.optim import EmaConfig, OptimConfig


def lr_schedule(cfg: OptimConfig, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return the learning rate of every step: a linear warm-up, then half a cosine."""
    warmup_steps = cfg.warmup_steps(num_steps)
    return warmup_cosine(cfg.lr, num_steps=num_steps, warmup_steps=warmup_steps, final=cfg.final_lr)


def weight_decay_schedule(cfg: OptimConfig, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return the weight decay of every step: half a cosine."""
    return cosine(cfg.weight_decay, cfg.final_weight_decay, num_steps=num_steps)


def momentum_schedule(cfg: EmaConfig, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return the momentum of the encoder's moving average at every step: half a cosine."""
    return cosine(cfg.momentum, cfg.final_momentum, num_steps=num_steps)


def warmup_cosine(
    peak: float, *, num_steps: int, warmup_steps: int, final: float = 0.0
) -> np.ndarray:  # [num_steps] fp64
    """Return a linear ramp from peak / warmup_steps to `peak`, then half a cosine to `final`.

    Raises ValueError when the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(f"warmup_steps: expected 0 to num_steps = {num_steps}, got {warmup_steps}")
    warmup = peak * np.arange(1, warmup_steps + 1) / max(warmup_steps, 1)
    return np.concatenate([warmup, cosine(peak, final, num_steps=num_steps - warmup_steps)])


def cosine(start: float, final: float, *, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return half a cosine from `start` at the first step to `final` at the last."""
    progress = np.arange(num_steps) / max(num_steps - 1, 1)
    return final + 0.5 * (start - final) * (1 + np.cos(np.pi * progress))
