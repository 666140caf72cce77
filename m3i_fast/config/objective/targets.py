"""What terms may predict: one row a target.

A row says what z is of, which predictors and encoders go with it, which module computes the term
and what counts its operations. A target of your own is one more row, which its file puts here
(docs/extend/new_method.md), beside the rows of its losses in `losses.LOSSES`.

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
    """Describe a target z: its predictors and encoders, the term's module and its FLOPs."""

    help: str
    """What z is, in a few words, as `m3i-fast methods --explain` tells it."""
    of: Literal["annotation", "cells", "view"]
    """What z is of: an annotation of the picture, which some pictures lack; single cells of a view;
    or a view as a whole."""
    predictors: tuple[str, ...]
    """Predictors of z_hat that a term may name."""
    encoders: tuple[str, ...]
    """Encoders of z that a term may name; none where z is no feature."""
    views: tuple[str, ...] = ("same", "other")
    """Views of the target that a term may name."""
    build: str | Callable[..., Any]
    """Path "package.module:name" of what builds the term's module, called with the term, the
    objective's config and `objectives.terms.Sizes`; or the callable itself."""
    count: str | Callable[..., None]
    """Path of the function that adds the term's operations to those of a step, called with the
    term, `costs.step_sizes.StepCounts` and the operations by part; or the function itself."""
    summaries: Literal["none", "global", "all"] = "none"
    """Encoded views of which the term reads the mean: none, the global ones, or local ones too."""
    column: Literal["", "class", "labels", "numbers", "text", "regions"] = ""
    """Kind of the named column that z is taken from, where a term names one; empty: from none."""
    has_default: bool = False
    """Whether every data set has such a column without a name: its class, its captions."""

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
ANSWERS = (*LABELS, "labels", "numbers")
"""Targets that a term's head alone answers for a picture, once it is trained."""
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
        column="class",
        has_default=True,
    ),
    "caption": Target(
        help="embedding of the picture's caption",
        of="annotation",
        predictors=("head",),
        encoders=("none",),
        build=f"{_TERMS}.labels:Caption",
        count=f"{_COUNTS}:add_label",
        summaries="all",
        column="text",
        has_default=True,
    ),
    "caption_tokens": Target(
        help="tokens of the picture's caption, each after those before it",
        of="annotation",
        predictors=("captioner",),
        encoders=("none",),
        build=f"{_TERMS}.caption_tokens:CaptionTokens",
        count=f"{_COUNTS}:add_caption_tokens",
        column="text",
        has_default=True,
    ),
    "grounded_caption": Target(
        help="tokens of the box of each region, then of its text, each after those before it",
        of="annotation",
        predictors=("captioner",),
        encoders=("none",),
        build=f"{_TERMS}.regions:GroundedCaption",
        count=f"{_COUNTS}:add_region_tokens",
        column="regions",
    ),
    "referring_box": Target(
        help="tokens of the text of each region, then of its box, each after those before it",
        of="annotation",
        predictors=("captioner",),
        encoders=("none",),
        build=f"{_TERMS}.regions:ReferringBox",
        count=f"{_COUNTS}:add_region_tokens",
        column="regions",
    ),
    "labels": Target(
        help="which labels the picture has, of a set",
        of="annotation",
        predictors=("head",),
        encoders=("none",),
        build=f"{_TERMS}.columns:Labels",
        count=f"{_COUNTS}:add_column",
        summaries="all",
        column="labels",
    ),
    "numbers": Target(
        help="numbers of the picture, standardised",
        of="annotation",
        predictors=("head",),
        encoders=("none",),
        build=f"{_TERMS}.columns:Numbers",
        count=f"{_COUNTS}:add_column",
        summaries="all",
        column="numbers",
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
    "gram": Target(
        help="cosines of all pairs of a view's patches",
        of="cells",
        predictors=("none",),
        encoders=("momentum", "snapshot", "frozen"),
        views=("same",),
        build=f"{_TERMS}.gram:Gram",
        count=f"{_COUNTS}:add_gram",
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
    "mean_embedding": Target(
        help="mean embedding of the picture's global views, which each view of it predicts",
        of="view",
        predictors=("projector",),
        encoders=("shared",),
        views=("other",),
        build=f"{_TERMS}.mean_embedding:MeanEmbedding",
        count=f"{_COUNTS}:add_mean_embedding",
        summaries="all",
    ),
    "cell_prototypes": Target(
        help="a cell's assignment to prototypes",
        of="cells",
        predictors=("mask_token", "decoder"),
        encoders=("momentum",),
        build=f"{_TERMS}.cells:CellPrototypes",
        count=f"{_COUNTS}:add_cell_prototypes",
    ),
    "summary": Target(
        help="the encoder's own mean of the view, which nothing predicts",
        of="view",
        predictors=("none",),
        encoders=("shared",),
        build=f"{_TERMS}.summary:Summary",
        count=f"{_COUNTS}:add_summary",
        summaries="global",
    ),
}
