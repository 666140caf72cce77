"""The arms that are compared: one stage of one method, or two stages one after the other.

All arms have the demo's encoder, views, batch and optimiser. Local views are cut for the methods
that read them, and for no other, so that no arm pays for pictures that it does not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m3i_fast.benchmarks.methods import plan as methods
from m3i_fast.config import TrainConfig
from m3i_fast.config.convert import to_tree
from m3i_fast.objectives.methods import METHODS

CHECKPOINT_EVERY = 200  # steps; what a run that is killed loses at most


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of an arm's time that is spent on one method."""

    method: str
    """A name of METHODS, or of the methods' benchmark's variants."""
    share: float = 1.0
    """Of the arm's time."""

    @property
    def needs_annotation(self) -> bool:
        """Return whether a picture without class and caption gives the stage nothing to learn."""
        return all(term.is_annotation for term in stage_config(self).objective.active_terms)


ARMS: Mapping[str, tuple[Stage, ...]] = {
    "m3i": (Stage("m3i"),),
    "siameseim": (Stage("siameseim"),),
    "category + caption": (Stage("category + caption"),),
    "slip": (Stage("slip"),),
    "two stages": (Stage("siameseim", 0.7), Stage("category + caption", 0.3)),
    "supervised": (Stage("supervised"),),
    "clip": (Stage("clip"),),
    "mae": (Stage("mae"),),
    "dinov2": (Stage("dinov2"),),
    "m3i + ibot": (Stage("m3i + ibot"),),
}
OURS = "m3i"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """What is chosen for each arm alike, on concepts that no counted run is measured on."""

    lr: float = 1.0
    """Factor of the learning rate."""
    label_weight: float = 1.0
    """Factor of the weights of category and caption, beside terms that see no annotation."""

    def of(self, cfg: TrainConfig) -> TrainConfig:
        """Return a config with these factors."""
        terms = tuple(
            replace(term, weight=term.weight * self.label_weight) if term.is_annotation else term
            for term in cfg.objective.terms
        )
        return replace(
            cfg,
            optim=replace(cfg.optim, lr=cfg.optim.lr * self.lr),
            objective=replace(cfg.objective, terms=terms),
        )


def has_label_weight(arm: str) -> bool:
    """Return whether a stage of an arm has both terms that see annotations and others.

    Where it has not, all of its terms would be scaled alike, which the optimiser undoes.
    """
    for stage in ARMS[arm]:
        seen = {term.is_annotation for term in stage_config(stage).objective.active_terms}
        if len(seen) == 2:
            return True
    return False


def stage_config(
    stage: Stage, *, num_classes: int = 9, data: Path = Path("data"), seed: int = 0
) -> TrainConfig:
    """Return what a stage trains, before it is tuned; its number of steps is not its own."""
    cfg = methods.config_of(stage.method, data=data, seed=seed)
    uses_local = METHODS[methods.base_of(stage.method)].local_views
    return replace(
        cfg,
        num_classes=num_classes,
        num_threads=1,
        checkpoint_every=CHECKPOINT_EVERY,
        data=replace(cfg.data, local_views=cfg.data.local_views if uses_local else None),
    )


def recipe_tree(stage: Stage, num_classes: int) -> dict[str, Any]:
    """Return a stage's config as a JSON object, which step times keep."""
    return to_tree(stage_config(stage, num_classes=num_classes))


def follows_recipe(stage: Stage, num_classes: int, tree: dict[str, Any]) -> bool:
    """Return whether `tree`, once written by `recipe_tree`, is the stage's config of today.

    They are compared field by field. A field that there was not yet has the value that the reader
    of an old config.json gives it; what can no longer be read is another recipe.
    """
    try:
        then = TrainConfig.from_tree(tree, Path(stage.method))
    except ValueError:
        return False
    return then == stage_config(stage, num_classes=num_classes)
