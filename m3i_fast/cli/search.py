"""m3i-fast search MODEL --data DIR: serve a page on which pictures are searched."""

from __future__ import annotations

import os
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from m3i_fast.cli import console
from m3i_fast.config.data import CACHE_DIR
from m3i_fast.config.fields import BATCHES, check_fields
from m3i_fast.flags import read_verb
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # torch takes seconds, and help does without
    from m3i_fast.inference.model import Model
    from m3i_fast.search.pictures import Pictures
    from m3i_fast.search.server import SearchServer


@dataclass(frozen=True, kw_only=True)
class SearchCommand:
    """Serve a page on this machine on which pictures are searched with what a run has learnt.

    By words, by a picture, and by a patch of one; with class guesses. Ctrl-C ends it.
    """

    model: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Run directory, one of its checkpoints, or a folder that `m3i-fast export RUN OUT --to
    safetensors` wrote."""
    data: Path
    """Pictures to search: a packed data set (or its URL), or a folder of pictures, also with a
    folder a class."""
    split: str | None = None
    """Split to search, of data that have some; none: all of them."""
    which: Literal["trained", "ema"] = "trained"
    """Encoder: the trained one, or its moving average, which has neither words nor guesses."""
    host: str = "127.0.0.1"
    """Address to listen at. Any other than loopback lets everyone who reaches it search and see
    the pictures: there is no password."""
    port: Annotated[int, range(0, 65_536)] = 8008
    """Port to listen at; 0: any that is free."""
    open: bool = False
    """Open the page in a browser of this machine."""
    device: str = "auto"
    """Device of the model; auto: the first GPU if there is one, else the CPU."""
    batch_size: Annotated[int, BATCHES] = 64
    """Pictures a forward pass, while features are computed."""
    cache_dir: Path = CACHE_DIR
    """Folder of the features, which are computed once for these weights and pictures."""

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> int:
    command = read_verb(SearchCommand, "search", argv)
    require("jinja2", extra="eval")  # told before the model is read
    require("PIL", extra="shards")
    from m3i_fast.inference.loading import load  # loads torch, which help does without
    from m3i_fast.search.pictures import open_pictures
    from m3i_fast.search.server import SearchServer

    with (
        SearchServer(command.host, command.port) as server,
        open_pictures(command.data, command.split, command.cache_dir) as pictures,
    ):
        model = load(command.model, which=command.which, device=command.device)
        return serve(command, server, model, pictures)


def serve(command: SearchCommand, server: SearchServer, model: Model, pictures: Pictures) -> int:
    """Compute the features that are missing, and serve the page until Ctrl-C."""
    from m3i_fast.search.answers import Answers
    from m3i_fast.search.features import cached_features

    num_threads = min(len(os.sched_getaffinity(0)), 16)
    with Progress(
        "encoding pictures",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=None)
        features = cached_features(
            model,
            pictures,
            command.cache_dir,
            batch_size=command.batch_size,
            num_threads=num_threads,
            tell=lambda done, total: progress.update(task, completed=done, total=total),
        )
    answers = Answers(
        model, pictures, features, model_name=str(command.model), num_threads=num_threads
    )
    try:
        tell(server)
        if command.open and not webbrowser.open(server.url):
            console.print("--open: found no browser; open the page by its address", soft_wrap=True)
        server.serve(answers)
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        answers.close()
    return 0


def tell(server: SearchServer) -> None:
    """Print where the page is, and who can reach it."""
    if not server.is_local:
        console.print(
            f"--host {server.host}: everyone who reaches this address can search and see these "
            "pictures, and there is no password",
            style="yellow",
            soft_wrap=True,
        )
    make_console().print(server.url, highlight=False, soft_wrap=True)
    console.print("Ctrl-C ends it", highlight=False)
