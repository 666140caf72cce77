"""The arguments of a benchmark: read, checked and told as those of every verb of m3i-fast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # `make gpu` has no cattrs, which configs need
    from m3i_fast.config import TrainConfig

Command = TypeVar("Command")


def read_command(
    kind: type[Command], subject: str, argv: list[str] | None, *, default: Command | None = None
) -> Command:
    """Return the benchmark's command as its arguments ask; without any its default.

    argv: those of this process unless given; default: `kind` without arguments unless given. Raises
    ValueError for every flag and value that is wrong, SystemExit for --help.
    """
    arguments = sys.argv[1:] if argv is None else argv
    default = kind() if default is None else default
    if not arguments:  # `make gpu` has neither tyro nor cattrs
        return default
    from m3i_fast.flags import read_flags

    return read_flags(kind, arguments, prog=f"m3i-fast bench {subject}", default=default)


def read_recipe_command(
    subject: str,
    argv: list[str],
    make: Callable[[str, TrainConfig], Command],
    recipe: str | None = None,
) -> Command:
    """Return the command that `RECIPE --flag value ...` or `--config FILE ...` asks for.

    make: the default command of a recipe's name and config; recipe: the one that is taken where the
    arguments name none. Raises as `find_recipe` and `read_command`; --help tells the benchmark's
    own flags, and where those of the recipe are told.
    """
    from m3i_fast.flags import own_help, read_flags
    from m3i_fast.recipes import find_recipe
    from m3i_fast.recipes.catalogue import typed_recipe

    recipe_name, config, rest = find_recipe(argv, recipe)
    default = make(recipe_name, config)
    if {"-h", "--help"} & set(rest):
        named = typed_recipe(argv) if argv[0] == "--config" else recipe_name
        told = own_help(f"bench {subject}", named, default)
        make_console().print(told, highlight=False, soft_wrap=True)
        raise SystemExit(0)
    prog = f"m3i-fast bench {subject} {recipe_name}"
    return read_flags(type(default), rest, prog=prog, default=default)
