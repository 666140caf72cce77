"""M3I with one thing changed at a time, as functions of the demo's config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from m3i_fast.config import TrainConfig
from m3i_fast.config.objective.heads import CaptionerConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import Term
from m3i_fast.objectives.methods import CAPTION_TOKENS, cell_prototypes, prototypes

Change = Callable[[TrainConfig], TrainConfig]
AS_IT_WAS = " as before"  # a method's variant of this ending is a function of that method's demo


def without(*names: str) -> Change:
    """Return a change that leaves out the terms of these names."""

    def change(cfg: TrainConfig) -> TrainConfig:
        terms = tuple(replace(t, weight=0.0) if t.name in names else t for t in cfg.objective.terms)
        return replace(cfg, objective=replace(cfg.objective, terms=terms))

    return change


def unmixed(cfg: TrainConfig) -> TrainConfig:
    """Change every input to one whole image."""
    return _with_mixing(cfg, replace(cfg.objective.mixing, mode="none"))


def one_image(cfg: TrainConfig) -> TrainConfig:
    """Change every input to one image that shows half of its cells."""
    mixing = replace(cfg.objective.mixing, mode="masked", mask_ratio=0.5, final_mask_ratio=0.5)
    return _with_mixing(cfg, mixing)


def of_images(count: int) -> Change:
    """Return a change to so many images an input, and to the nearest batch that they divide."""

    def change(cfg: TrainConfig) -> TrainConfig:
        mixing = replace(cfg.objective.mixing, num_images=count)
        return replace(
            cfg,
            data=replace(cfg.data, batch_size=count * max(1, round(cfg.data.batch_size / count))),
            objective=replace(cfg.objective, mixing=mixing),
        )

    return change


def balanced(mode: Literal["fixed", "gradient_norm", "uncertainty"]) -> Change:
    """Return a change of how the terms are weighted."""

    def change(cfg: TrainConfig) -> TrainConfig:
        balance = replace(cfg.objective.balance, mode=mode)
        return replace(cfg, objective=replace(cfg.objective, balance=balance))

    return change


def as_before(cfg: TrainConfig) -> TrainConfig:
    """Return the config with all terms as they were when dense ones starved.

    Label terms are means over the rows that have one; dense targets are as the encoder gives them,
    decorrelated by their second moment, of weight 0.3, asked of a quarter of the inputs and 16
    cells; each image is alone.
    """
    mixing = replace(
        cfg.objective.mixing,
        mode="own_image",
        min_contrast=0,
        num_queries=16,
        dense_fraction=0.25,
    )
    terms = tuple(
        replace(t, standardise="none", regulariser="decorrelation", weight=0.3)
        if t.is_dense
        else replace(t, mean="members")
        for t in cfg.objective.terms
    )
    return replace(cfg, objective=replace(cfg.objective, terms=terms, mixing=mixing))


def of_dense(**changes: object) -> Change:
    """Return a change of the dense terms' fields."""
    return _of_terms(lambda term: term.is_dense, changes)


def of_labels(**changes: object) -> Change:
    """Return a change of the category and caption terms' fields."""
    return _of_terms(lambda term: not term.is_dense, changes)


def _of_terms(chosen: Callable[[Term], bool], changes: dict[str, object]) -> Change:
    def change(cfg: TrainConfig) -> TrainConfig:
        terms = tuple(
            replace(t, **changes) if chosen(t) else t  # type: ignore[arg-type]
            for t in cfg.objective.terms
        )
        return replace(cfg, objective=replace(cfg.objective, terms=terms))

    return change


def of_mixing(**changes: object) -> Change:
    """Return a change of the mixing's fields."""
    return lambda cfg: _with_mixing(cfg, replace(cfg.objective.mixing, **changes))  # type: ignore[arg-type]


def projected(kind: Literal["mlp", "batch_norm"], **of_terms: object) -> Change:
    """Return a change that puts a projector before the decoder and before dense targets."""

    def change(cfg: TrainConfig) -> TrainConfig:
        decoder = replace(cfg.objective.decoder, projector=kind)
        cfg = replace(cfg, objective=replace(cfg.objective, decoder=decoder))
        return of_dense(**of_terms)(cfg)

    return change


def _with_mixing(cfg: TrainConfig, mixing: MixingConfig) -> TrainConfig:
    return replace(cfg, objective=replace(cfg.objective, mixing=mixing))


def and_terms(*more: Term) -> Change:
    """Return a change that adds terms, and gives a captioner the size of the text encoder."""

    def change(cfg: TrainConfig) -> TrainConfig:
        text = cfg.text
        captioner = CaptionerConfig(dim=text.dim, depth=text.depth, num_heads=text.num_heads)
        objective = replace(cfg.objective, terms=cfg.objective.terms + more, captioner=captioner)
        return replace(cfg, objective=objective)

    return change


# iBOT's terms in M3I: the decoder, which has mask tokens, assigns each of the input view's cells;
# the view as a whole and the local ones are assigned as the other view is.
OF_VIEW = prototypes(name="prototypes")
OF_CELLS = cell_prototypes(name="cells", predictor="decoder")
raw_targets = of_dense(standardise="none", regulariser="decorrelation")

# M3I itself has four terms, two images an input and fixed weights.
VARIANTS: dict[str, Change] = {
    "m3i - intra": without("intra"),
    "m3i - inter": without("inter"),
    "m3i - category": without("category"),
    "m3i - caption": without("caption"),
    "category + caption": without("intra", "inter"),
    "m3i as before": as_before,
    "siameseim as before": raw_targets,
    "m3i: mean over members": of_labels(mean="members"),
    "m3i: raw targets": raw_targets,
    "m3i: targets by batch": of_dense(standardise="batch"),
    "m3i: second moment": of_dense(regulariser="decorrelation"),
    "m3i: batch norm projector": projected("batch_norm", standardise="none"),
    "m3i: projector": projected("mlp"),
    "m3i: few asked": of_mixing(num_queries=16, dense_fraction=0.25),
    "m3i: blank cells": of_mixing(min_contrast=0, num_queries=0),
    "m3i: dense 0.3": of_dense(weight=0.3),
    "m3i: dense 1": of_dense(weight=1.0),
    "m3i: dense 10": of_dense(weight=10.0),
    "m3i: each alone": of_mixing(mode="own_image"),
    "m3i - mixing": unmixed,
    "m3i: 1 image": one_image,
    "m3i: 3 images": of_images(3),
    "m3i + ibot": and_terms(OF_VIEW, OF_CELLS),
    "m3i + ibot + captioner": and_terms(OF_VIEW, OF_CELLS, CAPTION_TOKENS),
    "m3i: gradient norm": balanced("gradient_norm"),
    "m3i: uncertainty": balanced("uncertainty"),
}
# What was before a repair: arms of the table of few annotations.
AS_BEFORE = tuple(name for name in VARIANTS if name.endswith(AS_IT_WAS))
# M3I with more targets: arms of the table of what these are worth.
WITH_TARGETS = tuple(name for name in VARIANTS if name.startswith("m3i + "))
NOTE = (
    "m3i - X: without the term X; category + caption: without the two others; as before: label "
    "terms are means over the rows that have one, dense targets raw, of weight 0.3 and asked of "
    "a quarter of the inputs and 16 cells, each image alone; mean over members, raw targets, few "
    "asked, dense 0.3, each alone: these one at a time; dense 1, dense 10: where m3i has 3; "
    "targets by batch, second moment, projector: other ways to standardise and decorrelate; blank "
    "cells: these are asked too; m3i - mixing: each input is one whole image; 1 image: one image "
    "with half of its cells hidden, where two of m3i share the cells; gradient norm, uncertainty: "
    "how the terms are weighted, where m3i has fixed weights; + ibot: with prototypes of the view "
    "and of its cells; + captioner: and the caption's tokens, one after another"
)
