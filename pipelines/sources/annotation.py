"""Which concepts keep their class and which their caption, drawn from keyed hashes.

A larger share keeps every concept of a smaller one: 1 % is contained in 10 % and that in 100 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from m3i_fast.pipelines.dataset.pack import keyed_order, keyed_rank

Annotation = Literal["both", "caption", "class", "none"]


def annotate(
    category_of: Mapping[int, str], *, seed: int, labelled: float, captioned: float | None
) -> dict[int, Annotation]:
    """What each training concept keeps.

    With `captioned`: a class in one share and a caption in another, drawn independently of each
    other, each balanced over categories (`keep_share`). Without: both in a `labelled` share of all,
    and thirds of the rest keep the caption only, the class only, nothing.
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
    """That share of each category's concepts, to the nearest whole concept, but at least one.

    A share of 0 keeps none. Of one category it is the concepts of lowest hash: whether a concept is
    kept depends on the others of its category alone.
    """
    members: dict[str, list[int]] = {}
    for group, category in category_of.items():
        members.setdefault(category, []).append(group)
    kept: set[int] = set()
    for groups in members.values():
        number = max(round(share * len(groups)), 1) if share > 0 else 0
        kept.update(sorted(groups, key=lambda group: keyed_rank(*key, group))[:number])
    return kept
