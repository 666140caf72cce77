"""The arguments of a benchmark: read, checked and told as those of every verb of m3i-fast."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
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
    from m3i_fast.flags import help_text, read_flags
    from m3i_fast.recipes import find_recipe

    recipe_name, config, rest = find_recipe(argv, recipe)
    default = make(recipe_name, config)
    if {"-h", "--help"} & set(rest):
        names = [field.name for field in fields(default)]  # type: ignore[arg-type]
        own = [name for name in names if name not in ("config", "recipe")]
        make_console().print(
            f"usage: m3i-fast bench {subject} RECIPE [--flag value ...]\n\n"
            f"{help_text(default, {'flags': own})}\n\n"
            f"Beside these, all of the recipe's: m3i-fast train {recipe_name} --help-all",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(0)
    prog = f"m3i-fast bench {subject} {recipe_name}"
    return read_flags(type(default), rest, prog=prog, default=default)
