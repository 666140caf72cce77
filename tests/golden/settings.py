"""Parts of what a person sets: configs of recipes, flags, wrong values, commands of the docs."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
import warnings
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import tyro

from m3i_fast import recipes as catalogue
from m3i_fast.benchmarks.subjects import SUBJECTS
from m3i_fast.cli import VERBS, main
from m3i_fast.config import (
    LoaderConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    ViewConfig,
    ViTConfig,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "demo"  # whose config others are written as a difference from
_OF_THE_MACHINE = {"bench faults --jobs", "bench methods --jobs", "bench one-stage --jobs"}


# ---- Recipes -------------------------------------------------------------------------------------


def recipes() -> dict[str, Any]:
    """Return config.json of the demo, and of every other recipe the fields that differ from it."""
    of_recipe = {
        name: dict(_leaves(json.loads(make().to_json())))
        for name, make in catalogue.recipes().items()
    }
    base = of_recipe.pop(RECIPE)
    return {RECIPE: base} | {
        name: {
            path: leaves.get(path, "absent")
            for path in dict.fromkeys([*base, *leaves])
            if base.get(path, "absent") != leaves.get(path, "absent")
        }
        for name, leaves in of_recipe.items()
    }


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of the fields of a config's tree; lists of numbers are values."""
    if isinstance(tree, dict):
        members = tree.items()
    elif isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        members = enumerate(tree)
    else:
        yield path, tree
        return
    for name, member in members:
        yield from _leaves(member, f"{path}.{name}" if path else str(name))


# ---- Flags ---------------------------------------------------------------------------------------


def flags() -> dict[str, Any]:
    """Return the flags of every command: kind or choices, and default.

    The config's flags, which `train` has, are left out of all other commands if they are the same.
    """
    found: dict[str, dict[str, Any]] = {}
    for verb in VERBS:
        for words in [[verb, name] for name in SUBJECTS] if verb == "bench" else [[verb]]:
            found |= _flags_of(*words)
    train, plan = found["train"], found["plan"]
    of_config = {name: flag for name, flag in train.items() if plan.get(name) == flag}
    return {
        command: {
            name: flag
            for name, flag in of_command.items()
            if command == "train" or of_config.get(name) != flag
        }
        for command, of_command in found.items()
    }


class _Asked(BaseException):
    """Ends a command when it begins to read its flags."""

    def __init__(self, parser: ArgumentParser) -> None:
        self.parser = parser


def _read(command: Any, **given: Any) -> None:
    """Stand for `tyro.cli`: raise the parser of the command's flags."""
    used = {name: given[name] for name in ("prog", "default", "config") if name in given}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        raise _Asked(tyro.extras.get_parser(command, **used))


def _flags_of(*words: str) -> dict[str, dict[str, Any]]:
    """Return the flags of a command, or of its sub-commands, by the words that are typed."""
    text = io.StringIO()
    with (
        patch("tyro.cli", _read),
        patch("tyro.extras._subcommand_cli_from_dict.cli", _read),
        contextlib.redirect_stdout(text),
        contextlib.redirect_stderr(text),
    ):
        try:
            with contextlib.suppress(SystemExit):
                main([*words, "--help"])
            # A command that takes a recipe reads its flags once it has one.
            if f"m3i-fast {' '.join(words)} RECIPE" in text.getvalue():
                main([*words, RECIPE])
        except _Asked as asked:
            return dict(_of_parser(" ".join(words), asked.parser))
    # The others, launch, print a usage by themselves.
    return {" ".join(words): {name: {} for name in re.findall(r"--[a-z-]+", text.getvalue())}}


def _of_parser(command: str, parser: ArgumentParser) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a command and its flags; if it has sub-commands, each of them and its flags."""
    own: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for name, inner in action.choices.items():
                yield from _of_parser(f"{command} {name}", inner)
        elif action.dest != "help":
            name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            kind = list(action.choices) if action.choices else action.metavar
            # The parser has no defaults, but the end of its help has.
            ending = re.search(r"\((?:default: (.*)|required|optional)\)$", str(action.help), re.S)
            default = (ending[1] or ending[0]) if ending else ""
            if f"{command} {name}" in _OF_THE_MACHINE:
                default = "cores of the machine"
            own[name] = {"kind": kind, "default": default}
    if own or not parser._subparsers:
        yield command, own


# ---- Wrong values --------------------------------------------------------------------------------

NAN, INFINITE = math.nan, math.inf
BY_FLAG = (
    "train demo --optim.lr -1",
    "train demo --optim.lr nan",
    "train demo --optim.lr fast",
    "train demo --optim.lr",
    "train demo --optim.betas 0.9",
    "train demo --optim.learning-rate 1",
    "train demo --lr 1",
    "train demo --num-steps 0",
    "train demo --num-steps 1e3",
    "train demo --precision fp7",
    "train demo --vision.dim 130",
    "train demo --vision.mlp-ratio inf",
    "train demo --parallel.shard 0",
    "train demo --parallel.shard 2",
    "train demo --data.num-threads 1025",
    "train demo --data.global-views.scale 0.5 7",
    "train demo --objective.terms.intra.weight nan",
    "train demo --objective.terms.captions.weight 2",
    "train demo --resume --auto-resume",
    "train demo --max-hours 0",
    "train demo --out s3://bucket/run",
    "train dmo",
    "plan demo --card h1000",
    "plan demo --gpus 0",
    "export run out --to onxn",
    "export run out --to timm --license cc",
    "bench stepp",
    "tran demo",
)
BY_JSON: tuple[tuple[str, Any], ...] = (
    ("optim.lr", -1.0),
    ("optim.lr", NAN),
    ("optim.lr", "fast"),
    ("optim.name", "lars2"),
    ("ema.momentum", 1.5),
    ("objective.terms.1.weight", INFINITE),
    ("objective.terms.1.name", "intra"),
    ("objective.mixing.mask_ratio", 2.0),
    ("data.global_views.scale", [0.5, 7]),
    ("data.num_threads", 10**12),
    ("data.batch_size", 0),
    ("num_steps", 3.7),
    ("num_steps", True),
    ("compile", "false"),
    ("vision.dim", 130),
    ("precision", "fp7"),
    ("unknown_field", 1),
)
BY_PYTHON: tuple[tuple[Callable[..., Any], dict[str, Any]], ...] = (
    (OptimConfig, {"lr": 0.0}),
    (OptimConfig, {"lr": 0.0, "warmup_fraction": 2.0, "name": "lars", "impl": "te"}),
    (OptimConfig, {"betas": (0.9,)}),
    (OptimConfig, {"weight_decay": NAN}),
    (ViTConfig, {"num_heads": 0}),
    (ViTConfig, {"dim": 130}),
    (ViTConfig, {"mlp_ratio": 1e30}),
    (ViTConfig, {"image_size": 65}),
    (ViTConfig, {"position": "none"}),
    (ParallelConfig, {"shard": 0}),
    (ParallelConfig, {"accumulate": 0}),
    (LoaderConfig, {"num_threads": 1.5}),
    (LoaderConfig, {"backend": "tf"}),
    (ViewConfig, {"scale": (0.5, 7.0)}),
    (ViewConfig, {"size": 0}),
)


def wrong_values() -> dict[str, Any]:
    """Return what refuses each wrong value: exit code or exception, and its message."""
    return {
        "by flag": {command: _refused_flag(shlex.split(command)) for command in BY_FLAG},
        "by JSON": {f"{path} = {value!r}": _refused_json(path, value) for path, value in BY_JSON},
        "by Python": {
            f"{kind.__name__}({', '.join(f'{k}={v!r}' for k, v in fields.items())})": _refused(
                lambda kind=kind, fields=fields: kind(**fields)
            )
            for kind, fields in BY_PYTHON
        },
    }


def _refused_flag(argv: list[str]) -> dict[str, Any]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(argv)
    return {"exit code": code, "message": _lines(said.getvalue())}


def _refused_json(path: str, value: Any) -> dict[str, str]:
    tree = json.loads(catalogue.demo().to_json())
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
        node = node[int(parent) if parent.isdecimal() else parent]
    node[name] = value
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(tree))
        return _refused(lambda: TrainConfig.load(file), folder)


def _refused(make: Callable[[], Any], folder: str = "") -> dict[str, str]:
    try:
        return {"taken": str(make())[:80]}
    except Exception as error:
        return {"exception": type(error).__name__, "message": _lines(str(error), folder)}


def _lines(message: str, folder: str = "") -> list[str]:
    """Return the lines, without the names of temporary folders."""
    return [line.strip().replace(f"{folder}/", "") for line in message.strip().splitlines()]


# ---- Docs ----------------------------------------------------------------------------------------


def commands_of_docs() -> dict[str, list[str]]:
    """Return the lines of commands on each page of docs/extend."""
    return {
        path.name: [
            re.sub(r"\s{2,}# .*| # .*", "", line).strip()
            for block in re.findall(
                r"```(?:bash|console|sh)\n(.*?)```", path.read_text(), re.DOTALL
            )
            for line in block.replace("\\\n", " ").splitlines()
            if line.strip()
        ]
        for path in sorted((ROOT / "docs" / "extend").glob("*.md"))
    }
