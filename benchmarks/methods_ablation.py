"""M3I with one thing changed at a time, as functions of the demo's config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from m3i_fast.config import TrainConfig
from m3i_fast.objectives.mixing import MixingConfig

Change = Callable[[TrainConfig], TrainConfig]
AS_IT_WAS = " as before"  # a method's variant of this ending is a function of that method's demo


def without(*names: str) -> Change:
    """The terms of these names left out."""

    def change(cfg: TrainConfig) -> TrainConfig:
        terms = tuple(replace(t, weight=0.0) if t.name in names else t for t in cfg.objective.terms)
        return replace(cfg, objective=replace(cfg.objective, terms=terms))

    return change


def unmixed(cfg: TrainConfig) -> TrainConfig:
    """Every input is one whole image."""
    return _with_mixing(cfg, replace(cfg.objective.mixing, mode="none"))


def joint(cfg: TrainConfig) -> TrainConfig:
    """Two images share one sequence of tokens, where own_image gives each a half-length one."""
    return _with_mixing(cfg, replace(cfg.objective.mixing, mode="joint"))


def one_image(cfg: TrainConfig) -> TrainConfig:
    """An input is one image that shows half of its cells, as many as of two that share one."""
    mixing = replace(cfg.objective.mixing, mode="masked", mask_ratio=0.5, final_mask_ratio=0.5)
    return _with_mixing(cfg, mixing)


def of_images(count: int) -> Change:
    """So many images share an input; the batch is the nearest one that they divide."""

    def change(cfg: TrainConfig) -> TrainConfig:
        mixing = replace(cfg.objective.mixing, num_images=count)
        return replace(
            cfg,
            data=replace(cfg.data, batch_size=count * max(1, round(cfg.data.batch_size / count))),
            objective=replace(cfg.objective, mixing=mixing),
        )

    return change


def balanced(mode: Literal["fixed", "gradient_norm", "uncertainty"]) -> Change:
    """The terms' weights chosen in this way."""

    def change(cfg: TrainConfig) -> TrainConfig:
        balance = replace(cfg.objective.balance, mode=mode)
        return replace(cfg, objective=replace(cfg.objective, balance=balance))

    return change


def _with_mixing(cfg: TrainConfig, mixing: MixingConfig) -> TrainConfig:
    return replace(cfg, objective=replace(cfg.objective, mixing=mixing))


# M3I itself has four terms, two images an input and fixed weights.
VARIANTS: dict[str, Change] = {
    "m3i - intra": without("intra"),
    "m3i - inter": without("inter"),
    "m3i - category": without("category"),
    "m3i - caption": without("caption"),
    "category + caption": without("intra", "inter"),
    "m3i - mixing": unmixed,
    "m3i: joint": joint,
    "m3i: 1 image": one_image,
    "m3i: 3 images": of_images(3),
    "m3i: gradient norm": balanced("gradient_norm"),
    "m3i: uncertainty": balanced("uncertainty"),
}
# What was before a repair: arms of the table of few annotations.
AS_BEFORE = tuple(name for name in VARIANTS if name.endswith(AS_IT_WAS))
NOTE = (
    "m3i - X: without the term X; category + caption: without the two others; m3i - mixing: each "
    "input is one whole image; joint: the two images attend to each other; 1 image: one image with "
    "half of its cells hidden, where two of m3i share the cells; gradient norm, uncertainty: how "
    "the terms are weighted, where m3i has fixed weights"
)
