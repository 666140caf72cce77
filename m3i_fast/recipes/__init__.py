"""Recipes: functions that return a whole run, which `m3i-fast train NAME` starts from."""

from m3i_fast.recipes.catalogue import (
    GROUPS,
    RECIPES,
    find_recipe,
    needs_of,
    recipes,
    sentence_of,
)
from m3i_fast.recipes.demo import (
    DEMO_MERGES,
    demo,
    demo_internimage,
    demo_method,
    pack_demo,
)
from m3i_fast.recipes.shrink import shrink

__all__ = [
    "DEMO_MERGES",
    "GROUPS",
    "RECIPES",
    "demo",
    "demo_internimage",
    "demo_method",
    "find_recipe",
    "needs_of",
    "pack_demo",
    "recipes",
    "sentence_of",
    "shrink",
]
