"""Schedules as arrays indexed by step, known before the first: a resume needs only the step."""

from __future__ import annotations

import numpy as np

from m3i_fast.config.optim import EmaConfig, OptimConfig


def lr_schedule(cfg: OptimConfig, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return the learning rate of every step: a linear warm-up, a constant part, and the fall."""
    warmup_steps, decay_steps = cfg.warmup_steps(num_steps), cfg.decay_steps(num_steps)
    constant = num_steps - warmup_steps - decay_steps
    start = min(constant, 1)  # the fall begins at the last constant step, if there is one
    return np.concatenate(
        [
            warmup(cfg.lr, num_steps=warmup_steps),
            np.full(constant, cfg.lr),
            _FALLS[cfg.lr_decay](cfg.lr, cfg.final_lr, num_steps=decay_steps + start)[start:],
        ]
    )


def weight_decay_schedule(cfg: OptimConfig, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return the weight decay of every step: half a cosine."""
    return cosine(cfg.weight_decay, cfg.final_weight_decay, num_steps=num_steps)


def momentum_schedule(cfg: EmaConfig, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return the momentum of the encoder's moving average at every step: half a cosine."""
    return cosine(cfg.momentum, cfg.final_momentum, num_steps=num_steps)


def warmup(peak: float, *, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return a line from peak / num_steps to `peak`."""
    return peak * np.arange(1, num_steps + 1) / max(num_steps, 1)


def cosine(start: float, final: float, *, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return half a cosine from `start` at the first step to `final` at the last."""
    return final + 0.5 * (start - final) * (1 + np.cos(np.pi * _progress(num_steps)))


def linear(start: float, final: float, *, num_steps: int) -> np.ndarray:  # [num_steps] fp64
    """Return a line from `start` at the first step to `final` at the last."""
    return final + (start - final) * (1 - _progress(num_steps))


def one_minus_sqrt(start: float, final: float, *, num_steps: int) -> np.ndarray:  # [num_steps]
    """Return 1 - sqrt of the share of steps that are over, from `start` to `final`."""
    return final + (start - final) * (1 - np.sqrt(_progress(num_steps)))


def _progress(num_steps: int) -> np.ndarray:  # [num_steps] fp64
    return np.arange(num_steps) / max(num_steps - 1, 1)


_FALLS = {"cosine": cosine, "linear": linear, "sqrt": one_minus_sqrt}
