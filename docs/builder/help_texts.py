"""Print the --help of every command as JSON, {"data verify": "usage: ..."}: a process of its own.

    python docs/builder/help_texts.py

The config's fields, which `train`, `plan` and others take as flags too, have a page of their own,
and are left out.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

from m3i_fast.benchmarks.subjects import SUBJECTS
from m3i_fast.cli import VERBS, main

RECIPE = "demo"  # what a command that takes a recipe is asked for help with
CONFIG = "\n\nrun:\n"  # what the fields of a config begin with in a help


def help_of(*words: str, flag: str = "--help") -> str:
    """Return what `m3i-fast WORDS --help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        with contextlib.suppress(SystemExit):
            main([*words, flag])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def complete_help(*words: str) -> str:
    """Return a command's help; of one that takes a recipe also its own flags with one."""
    text = help_of(*words)
    if f"m3i-fast {' '.join(words)} RECIPE" in text and "\nflags:\n" not in text:
        with_recipe = help_of(*words, RECIPE)
        if f"m3i-fast {' '.join(words)} {RECIPE} --help-all" in with_recipe:
            with_recipe = help_of(*words, RECIPE, flag="--help-all")
        _, _, flags = with_recipe.partition("\n\n")
        usage = text.partition("\nrecipes: ")[0].rstrip()
        text = f"{usage}\n\n{flags.partition(CONFIG)[0]}"
    return text


def sub_commands(text: str) -> list[str]:
    """Return the names that a usage gives in braces, {ls,verify,consolidate}."""
    found = re.search(r"\{([a-z_,-]+)\}", text.partition("\n\n")[0])
    return found[1].split(",") if found else []


def texts() -> dict[str, str]:
    """Return the help of each verb, of its sub-commands and of each benchmark."""
    found = {}
    for verb in VERBS:
        found[verb] = complete_help(verb)
        names = list(SUBJECTS) if verb == "bench" else sub_commands(found[verb])
        for name in names:
            found[f"{verb} {name}"] = complete_help(verb, name)
    return found


if __name__ == "__main__":
    json.dump(texts(), sys.stdout)
