"""What terms may predict: one row a kind of target.

A row says what z is of, which predictors and encoders go with it, which module computes the term
and what counts its operations. A target of your own is one more row, which its file puts here
(docs/extend/new_method.md), beside the rows of its losses in `m3i_fast.config.losses.LOSSES`.

Nothing here imports torch: a row names what builds and what counts it by path, which is resolved
when a term is built or counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Describe a kind of target: what it is of, what goes with it, what builds and counts it."""

    help: str
    """What z is, in a few words."""
    of: Literal["annotation", "cells", "view"]
    """What z is of: an annotation of the picture, which some pictures lack; single cells of a view;
    or a view as a whole."""
    predictors: tuple[str, ...]
    """Predictors of z_hat that a term may name."""
    encoders: tuple[str, ...]
    """Encoders of z that a term may name; none where z is no feature."""
    build: str | Callable[..., Any]
    """Path "package.module:name" of what builds the term's module, called with the term, the
    objective's config and `objectives.terms.Sizes`; or the callable itself."""
    count: str | Callable[..., None]
    """Path of the function that adds the term's operations to those of a step, called with the
    term, `costs.step_sizes.StepCounts` and the operations by part; or the function itself."""
    summaries: Literal["none", "global", "all"] = "none"
    """Encoded views of which the term reads the mean: none, the global ones, or local ones too."""

    def builder(self) -> Callable[..., Any]:
        """Return what builds the term's module."""
        return _resolved(self.build)

    def counter(self) -> Callable[..., None]:
        """Return what counts the term's operations."""
        return _resolved(self.count)


def _resolved(path: str | Callable[..., Any]) -> Callable[..., Any]:
    return resolve_name(path) if isinstance(path, str) else path


_TERMS = "m3i_fast.objectives.terms"
_COUNTS = "m3i_fast.costs.objective_flops"
LABELS = ("category", "caption")
"""Targets in whose space a term's head embeds pictures."""
ENCODERS = ("momentum", "shared", "frozen")
"""Encoders of targets that are features of a view as a whole."""

TARGETS: dict[str, Target] = {
    "category": Target(
        help="embedding of the picture's class",
        of="annotation",
        predictors=("head",),
        encoders=("none",),
        build=f"{_TERMS}.labels:Category",
        count=f"{_COUNTS}:add_label",
        summaries="all",
    ),
    "caption": Target(
        help="embedding of the picture's caption",
        of="annotation",
        predictors=("head",),
        encoders=("none",),
        build=f"{_TERMS}.labels:Caption",
        count=f"{_COUNTS}:add_label",
        summaries="all",
    ),
    "pixels": Target(
        help="pixels of a patch, normalised",
        of="cells",
        predictors=("linear", "decoder"),
        encoders=("none",),
        build=f"{_TERMS}.dense:build",
        count=f"{_COUNTS}:add_dense",
    ),
    "features": Target(
        help="features of a patch",
        of="cells",
        predictors=("linear", "decoder", "projector"),
        encoders=("momentum", "frozen"),
        build=f"{_TERMS}.dense:build",
        count=f"{_COUNTS}:add_dense",
    ),
    "embedding": Target(
        help="one embedding of the view",
        of="view",
        predictors=("projector", "projector_predictor"),
        encoders=ENCODERS,
        build=f"{_TERMS}.views:Embedding",
        count=f"{_COUNTS}:add_embedding",
        summaries="global",
    ),
    "prototypes": Target(
        help="the view's assignment to prototypes",
        of="view",
        predictors=("projector",),
        encoders=ENCODERS,
        build=f"{_TERMS}.views:PrototypeTerm",
        count=f"{_COUNTS}:add_prototypes",
        summaries="all",
    ),
}
