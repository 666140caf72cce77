"""Methods as lists of terms.

A term names what is predicted, by what, under which likelihood, and what keeps the target from
collapsing: the plug-ins of the paper's equation  L = sum_k w_k * -log P_k(z_k | z_hat_k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Target = Literal["same_view", "other_view", "category", "caption"]
_DENSE = ("same_view", "other_view")


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    name: str
    """Key of the term in metrics and tables."""
    target: Target
    """same_view, other_view: dense features of the EMA encoder; category: class embeddings;
    caption: the text encoder."""
    predictor: Literal["decoder", "global_head"]
    """decoder: Transformer decoder with mask tokens; global_head: mask-weighted pooling and an
    MLP."""
    likelihood: Literal["gaussian", "boltzmann"]
    """gaussian: L2; boltzmann: softmax over all candidates."""
    regulariser: Literal["stop_gradient", "decorrelation", "negatives"]
    """What replaces the entropy H(p(z)): stop-gradient + EMA, the same with SiameseIM's
    decorrelation, or negatives."""
    weight: float = 1.0
    """Weight in the sum; 0 leaves the term out, with all that only it needs."""

    def __post_init__(self) -> None:
        if self.target in _DENSE:
            expected = {
                ("decoder", "gaussian", "stop_gradient"),
                ("decoder", "gaussian", "decorrelation"),
            }
        else:
            expected = {("global_head", "boltzmann", "negatives")}
        got = (self.predictor, self.likelihood, self.regulariser)
        if got not in expected:
            raise ValueError(
                f"term {self.name!r}: target {self.target} expects {sorted(expected)}, got {got}"
            )
        if self.weight < 0:
            raise ValueError(f"term {self.name!r}: weight: expected >= 0, got {self.weight}")

    @property
    def is_dense(self) -> bool:
        return self.target in _DENSE


def m3i() -> tuple[Term, ...]:
    """M3I, figure 2.

    The first image predicts its own view, the other one another view, both their category and
    caption.
    """
    return (
        Term(
            name="intra",
            target="same_view",
            predictor="decoder",
            likelihood="gaussian",
            regulariser="decorrelation",
        ),
        Term(
            name="inter",
            target="other_view",
            predictor="decoder",
            likelihood="gaussian",
            regulariser="decorrelation",
        ),
        Term(
            name="category",
            target="category",
            predictor="global_head",
            likelihood="boltzmann",
            regulariser="negatives",
        ),
        Term(
            name="caption",
            target="caption",
            predictor="global_head",
            likelihood="boltzmann",
            regulariser="negatives",
        ),
    )


METHODS: dict[str, Callable[[], tuple[Term, ...]]] = {"m3i": m3i}
