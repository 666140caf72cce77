"""m3i-fast recipes: every recipe by group, with what it trains and what it needs."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from m3i_fast.objectives.methods import METHODS
from m3i_fast.recipes import GROUPS, needs_of, sentence_of
from m3i_fast.terminal import make_console

console = make_console()


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """Every recipe; `m3i-fast train NAME` trains one, `m3i-fast plan NAME` says how fast."""


def main(argv: list[str]) -> int:
    tyro.cli(Recipes, prog="m3i-fast recipes", args=argv)
    console.print("\n".join(lines()), highlight=False, soft_wrap=True)
    return 0


def lines() -> list[str]:
    """Return three lines a recipe, and one a method that trains on the demo's data."""
    listed = []
    for title, makes in GROUPS.items():
        listed += [title, ""]
        for make in makes:
            listed += [f"  {make.__name__}", f"      {sentence_of(make)}"]
            listed += [f"      needs {needs_of(make)}", ""]
    listed += ["Other methods on the demo's data (`m3i-fast methods` tells their terms)", ""]
    widest = max(len(name) for name in METHODS)
    for name, method in METHODS.items():
        listed.append(f"  {f'demo_{name}':<{widest + 7}}{method.title} ({method.paper})")
    return listed
