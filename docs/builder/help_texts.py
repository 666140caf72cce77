"""Print the --help of every command as JSON, {"data verify": "usage: ..."}: a process of its own.

    python docs/builder/help_texts.py

The config's fields, which `train`, `plan` and others take as flags too, have a page of their own,
and are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys

from m3i_fast.benchmarks.subjects import SUBJECTS
from m3i_fast.cli import VERBS, main
from m3i_fast.recipes import recipes

RECIPE = "demo"  # what a command that takes a recipe is asked for help with
OF_A_CONFIG = " data options"  # a heading that the help of such a command alone has
KEPT = (" options", " positional arguments", " subcommands")
FIELDS = {field.name.replace("_", "-") for field in dataclasses.fields(recipes()[RECIPE]())}


def help_of(*words: str, flag: str = "--help") -> str:
    """Return what `m3i-fast WORDS --help` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        with contextlib.suppress(SystemExit):
            main([*words, flag])
    return "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())


def complete_help(*words: str) -> str:
    """Return a command's help; of one that takes a recipe also all that it says with one."""
    text = help_of(*words)
    if f"m3i-fast {' '.join(words)} RECIPE" in text:
        with_recipe = help_of(*words, RECIPE)
        if f"m3i-fast {' '.join(words)} {RECIPE} --help-all" in with_recipe:
            with_recipe = help_of(*words, RECIPE, flag="--help-all")
        usage = text.partition("\nrecipes: ")[0].rstrip()
        text = f"{usage}\n\n{with_recipe}"
    if OF_A_CONFIG in text:
        text = without_config(text).replace(f" {RECIPE} [-h]", " RECIPE [-h]")
    return text


def without_config(text: str) -> str:
    """Return a help without the flags that are fields of the config."""
    head, *sections = re.split(r"^( [a-z0-9. -]+)\n -+\n", text, flags=re.MULTILINE)
    head = re.sub(r" \[\{data\.[^}]+\}\]", " [--field value ...]", head)
    parts = [head.rstrip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        flags = [flag for flag in re.split(r"^(?=  -)", body, flags=re.MULTILINE) if _is_own(flag)]
        if title in KEPT and flags and "data.local-views:" not in body:
            parts.append(f"{title}\n {'-' * 86}\n" + "".join(flags).rstrip())
    return "\n\n".join([*parts, "  and every field of the config"])


def _is_own(flag: str) -> bool:
    """Whether a flag of a help is none of the config's root."""
    name = re.match(r"  --([a-z0-9-]+)", flag)
    return name is None or name[1] not in FIELDS


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
