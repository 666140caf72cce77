"""How the terms of an objective are weighted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from m3i_fast.config.fields import COUNTS, Checked, Conflict, unmet


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceConfig(Checked):
    """Choose the terms' weights, and how often gradient norms are measured for them."""

    mode: Literal["fixed", "gradient_norm", "uncertainty"] = "fixed"
    """fixed: the terms' weights as they are; gradient_norm: terms of one weight pull on the encoder
    alike; uncertainty: a variance is learnt for each term."""
    every: Annotated[int, COUNTS] = 10
    """Steps between two measurements of the gradient norms; each costs, for every
    term, one more backward pass of its predictor and none of the encoder."""
    momentum: float = 0.9
    """Momentum of the running gradient norms; 0 takes the newest alone."""

    def place(self) -> str:
        return "balance."

    def conflicts(self) -> Iterator[Conflict]:
        return unmet(self, momentum=(0 <= self.momentum < 1, "in [0, 1)"))
