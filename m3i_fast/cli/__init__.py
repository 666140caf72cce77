"""m3i-fast: one verb a file."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Mapping
from typing import Any

from rich.logging import RichHandler
from rich.text import Text

import m3i_fast
from m3i_fast.backward_threads import release_last_backward
from m3i_fast.did_you_mean import nearest
from m3i_fast.engine.parallel.watchdog import (
    EXIT_CODE,
    LOST_PEER,
    MissingRanks,
    end_at_once,
    in_a_world,
    lost_a_peer,
)
from m3i_fast.terminal import make_console

VERBS = {
    "demo": "pack real captioned pictures, pre-train, evaluate, and write a page of what was "
    "learnt",
    "train": "pre-train a recipe",
    "launch": "train on several GPUs or nodes under a scheduler: torchrun that passes signals on",
    "profile": "say where the time of a recipe's steps goes, and what makes two profiles differ",
    "plan": "say what a recipe needs on which cards, and how fast it can be, without running it",
    "recipes": "list the recipes: what each trains, and what it needs",
    "methods": "list the known methods and their terms, or explain one",
    "evaluate": "measure a run on held-out concepts, or any encoder on pictures of your own",
    "report": "write the page of a run, finished or going on: curves, samples, finds, speed",
    "search": "serve a page that searches pictures by words, by a picture, by a patch of one",
    "checkpoint": "list, verify or consolidate the checkpoints of a run",
    "export": "write what a run has learnt for timm, transformers, open_clip, InternImage, ONNX or "
    "torch.export",
    "data": "pack or index pictures of your own, or write openmoji, styles or synthetic; describe, "
    "verify, show or push a data set",
    "bench": "run one benchmark and append its rows to the ledger",
    "faults": "break runs in every way, and check that each recovers with equal weights",
    "doctor": "say what this machine can use and, where it cannot, why",
}

console = make_console(stderr=True)


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return the exit code.

    0: done, 1: failed, 2: wrong request, 69: another rank was lost, 75: saved to be resumed,
    76: hung, 130: interrupted.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        usage = "usage: m3i-fast VERB ...   (m3i-fast VERB --help tells more)"
        return show_usage(f"{usage}\n\n{listed(VERBS)}", asked=bool(arguments))
    if arguments[0] == "--version":
        make_console().print(f"m3i-fast {m3i_fast.__version__}", highlight=False)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return refuse(
            f"unknown verb {verb!r}: expected one of {', '.join(VERBS)}." + nearest(verb, VERBS)
        )
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        **_lines_of_log(),
    )
    code = _run(verb, rest)
    if code and in_a_world():
        end_at_once(code)
    release_last_backward()
    return code


def _lines_of_log() -> dict[str, Any]:
    """Return how lines of the log look: on a terminal wrapped and in colour, else whole."""
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
        return {"format": "%(message)s", "handlers": [handler]}
    return {"format": "%(asctime)s %(levelname)s %(message)s", "datefmt": "%Y-%m-%d %H:%M:%S"}


def _run(verb: str, arguments: list[str]) -> int:
    """Run a verb and return the exit code, with its errors printed."""
    try:
        return importlib.import_module(f"m3i_fast.cli.{verb}").main(arguments)
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        return refuse(str(error))
    except MissingRanks as error:
        refuse(str(error))
        return EXIT_CODE
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    except (FloatingPointError, OSError, RuntimeError) as error:
        if in_a_world() and lost_a_peer(error):
            said = f"{error}\nanother rank has ended, and says why, or its node was lost"
            return refuse(said, code=LOST_PEER)
        return refuse(str(error), code=1)
    except Exception:
        if not in_a_world():
            raise
        traceback.print_exc()
        return 1


def show_usage(text: str, *, asked: bool) -> int:
    """Print a usage and return the exit code: 0 where it was asked for, on standard output."""
    make_console(stderr=not asked).print(text, highlight=False, soft_wrap=True)
    return 0 if asked else 2


def listed(descriptions: Mapping[str, str]) -> str:
    """Return names with what each does, in lines as wide as the terminal."""
    margin = 4 + max(map(len, descriptions))
    width = max(make_console().width, margin + 30)
    return "\n".join(
        textwrap.fill(f"  {name:<{margin - 2}}{description}", width, subsequent_indent=" " * margin)
        for name, description in descriptions.items()
    )


def refuse(message: str, code: int = 2) -> int:
    """Print an error, and return the exit code: 2 for a wrong request."""
    console.print(Text.assemble(("error", "bold red"), f": {message}"), soft_wrap=True)
    return code
