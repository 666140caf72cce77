"""Partial annotation: which concepts keep their class and which their caption, by keyed hashes.

A larger share contains every concept of a smaller one: that of 1 % is part of that of 10 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from m3i_fast.pipelines.dataset.pack import keyed_hash, keyed_order

Annotation = Literal["both", "caption", "class", "none"]


def annotate(
    category_of: Mapping[int, str], *, seed: int, labelled: float, captioned: float | None
) -> dict[int, Annotation]:
    """Decide which annotations each training concept keeps.

    With `captioned` a share `labelled` keeps its class and a share `captioned` its caption, drawn
    independently and balanced over categories (`keep_share`). Without, a share `labelled` keeps
    both, and of the others a third each keeps the caption only, the class only, or nothing.
    """
    if captioned is None:
        return _in_thirds(sorted(category_of), seed=seed, labelled=labelled)
    classes = keep_share(category_of, labelled, "class", seed)
    captions = keep_share(category_of, captioned, "caption", seed)
    kinds: dict[tuple[bool, bool], Annotation] = {
        (True, True): "both",
        (True, False): "class",
        (False, True): "caption",
        (False, False): "none",
    }
    return {group: kinds[group in classes, group in captions] for group in sorted(category_of)}


def _in_thirds(groups: list[int], *, seed: int, labelled: float) -> dict[int, Annotation]:
    order = [groups[i] for i in keyed_order(len(groups), "labelled", seed)]
    num_labelled = round(labelled * len(order))
    kinds: tuple[Annotation, ...] = ("caption", "class", "none")
    result: dict[int, Annotation] = dict.fromkeys(order, "both")
    for position, group in enumerate(order):
        if position >= num_labelled:
            result[group] = kinds[position % 3]
    return result


def keep_share(category_of: Mapping[int, str], share: float, *key: object) -> set[int]:
    """Select a share of each category's concepts, rounded, but at least one unless it is 0.

    They are the concepts of lowest keyed hash of each category, so that whether a concept is kept
    depends only on the others of its category.
    """
    members: dict[str, list[int]] = {}
    for group, category in category_of.items():
        members.setdefault(category, []).append(group)
    kept: set[int] = set()
    for groups in members.values():
        number = max(round(share * len(groups)), 1) if share > 0 else 0
        kept.update(sorted(groups, key=lambda group: keyed_hash(*key, group))[:number])
    return kept
