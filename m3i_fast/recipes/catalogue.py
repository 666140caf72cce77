"""The recipes by name and by group, and what a person types to choose one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from m3i_fast.config.train import TrainConfig
from m3i_fast.did_you_mean import nearest
from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import (
    any_shape_vit,
    dinov2_vit,
    dinov3_vit,
    from_weights,
    m3i_internimage,
    m3i_vit,
    one_stage_vit,
    own_data,
    text_and_prototypes_vit,
)
from m3i_fast.recipes.demo import demo, demo_internimage, demo_method

Make = Callable[[], TrainConfig]

GROUPS: dict[str, tuple[Make, ...]] = {
    "to try it": (demo, demo_internimage),
    "for your own pictures": (own_data.vit_ti, own_data.vit_s, own_data.vit_b),
    "from weights of others (--init)": (
        *(from_weights.dinov2_s, from_weights.dinov2_b, from_weights.dinov2_l),
        *(from_weights.dinov3_s, from_weights.dinov3_b, from_weights.dinov3_l),
    ),
    "M3I with a ViT": (
        *(m3i_vit.m3i_vit_s, m3i_vit.m3i_vit_s_a100, m3i_vit.m3i_vit_s_h100),
        *(m3i_vit.m3i_vit_b, m3i_vit.m3i_vit_b_a100, m3i_vit.m3i_vit_b_h100),
        *(m3i_vit.m3i_vit_l, m3i_vit.m3i_vit_l_a100, m3i_vit.m3i_vit_l_h100),
        *(m3i_vit.m3i_vit_h, m3i_vit.m3i_vit_h_a100, m3i_vit.m3i_vit_h_h100),
    ),
    "M3I beside its parts, on eight cards": (
        *(one_stage_vit.one_stage_m3i_vit_s, one_stage_vit.one_stage_m3i_vit_b),
        *(one_stage_vit.one_stage_siameseim_vit_s, one_stage_vit.one_stage_siameseim_vit_b),
        *(one_stage_vit.one_stage_supervised_vit_s, one_stage_vit.one_stage_supervised_vit_b),
    ),
    "other methods over prototypes, from random weights": (
        *(dinov2_vit.dinov2_vit_s, dinov2_vit.dinov2_vit_b, dinov2_vit.dinov2_vit_l),
        *(dinov3_vit.dinov3_vit_s, dinov3_vit.dinov3_vit_b, dinov3_vit.dinov3_vit_l),
        dinov3_vit.dinov3_vit_s_gram,
        dinov3_vit.dinov3_vit_b_gram,
        dinov3_vit.dinov3_vit_l_gram,
        text_and_prototypes_vit.siglip2_vit_s,
        text_and_prototypes_vit.siglip2_vit_b,
        text_and_prototypes_vit.siglip2_vit_l,
        text_and_prototypes_vit.tips_vit_s,
        text_and_prototypes_vit.tips_vit_b,
        text_and_prototypes_vit.tips_vit_l,
    ),
    "pictures of any shape": (
        any_shape_vit.any_shape_vit_b,
        any_shape_vit.any_shape_vit_b_finish,
        any_shape_vit.any_shape_m3i_vit_b,
    ),
    "M3I with an InternImage": (
        m3i_internimage.m3i_internimage_t,
        m3i_internimage.m3i_internimage_s,
        m3i_internimage.m3i_internimage_b,
        m3i_internimage.m3i_internimage_l,
        m3i_internimage.m3i_internimage_xl,
        m3i_internimage.m3i_internimage_h,
        m3i_internimage.m3i_internimage_g,
    ),
}
RECIPES: dict[str, Make] = {make.__name__: make for makes in GROUPS.values() for make in makes}


def recipes() -> dict[str, Make]:
    """Return all of them by name: RECIPES, and demo_<method> of every method there is by now."""
    return RECIPES | {f"demo_{name}": partial(demo_method, name) for name in METHODS}


def sentence_of(make: Make) -> str:
    """Return what a recipe of `RECIPES` does, the first line of its docstring."""
    return _lines(make)[0]


def needs_of(make: Make) -> str:
    """Return what a recipe of `RECIPES` needs: data, cards, memory."""
    [needs] = [line for line in _lines(make) if line.startswith("Needs: ")]
    return needs.removeprefix("Needs: ").removesuffix(".")


def whole_batch(make: Make) -> int | None:
    """Return the pictures a step, of all its cards, that a recipe's rate and steps are for.

    None where it does not say how many cards: its views are of any shape.
    """
    cards = re.search(r"(a|[\d,]+) (?:[AH]100 )?cards? of", needs_of(make))
    if cards is None or "pictures a card" not in needs_of(make):
        return None
    number = 1 if cards[1] == "a" else int(cards[1].replace(",", ""))
    return number * make().data.batch_size


def _lines(make: Make) -> list[str]:
    return (inspect.getdoc(make) or "").splitlines()


def typed_recipe(argv: list[str]) -> str:
    """Return the words that name a recipe: its name, --config FILE or --resume RUN."""
    return " ".join(argv[: 2 if argv[0] in ("--config", "--resume") else 1])


def find_recipe(argv: list[str], default: str | None = None) -> tuple[str, TrainConfig, list[str]]:
    """Read `RECIPE ...` or `--config FILE ...`: its name, its config and the other arguments.

    default: the recipe where the arguments name none. Raises ValueError for an unknown recipe,
    FileNotFoundError for a missing file.
    """
    if default is not None and (not argv or argv[0].startswith("-") and argv[0] != "--config"):
        argv = [default, *argv]
    if argv[0] == "--config":
        if len(argv) < 2:
            raise ValueError("--config: expected a file")
        return Path(argv[1]).stem, TrainConfig.load(Path(argv[1])), argv[2:]
    known = recipes()
    if argv[0] not in known:
        raise ValueError(
            f"unknown recipe {argv[0]!r}: `m3i-fast recipes` lists them.{nearest(argv[0], known)}"
        )
    return argv[0], known[argv[0]](), argv[1:]
