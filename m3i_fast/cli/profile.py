"""m3i-fast profile RECIPE [--field value], profile diff A B: where the time of a step goes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from m3i_fast.cli import console, show_usage
from m3i_fast.config import TrainConfig
from m3i_fast.durable_files import expect_folder
from m3i_fast.flags import own_help, read_flags, typed_flags
from m3i_fast.recipes import find_recipe
from m3i_fast.recipes.catalogue import typed_recipe

if TYPE_CHECKING:  # torch takes seconds: help and refusals come before it
    from m3i_fast.profiling.profile_run import ProfileRun

logger = logging.getLogger(__name__)

USAGE = """\
usage: m3i-fast profile RECIPE [--out DIR] [--profiler auto|nsys|torch] [--warmup N] [--steps N]
                               [--field value ...]
       m3i-fast profile --config FILE [...]
       m3i-fast profile diff A B          (two --out folders, or their summary.json)
"""


@dataclass(frozen=True, kw_only=True)
class ProfileCommand:
    """Profile steady steps of a recipe, and say where their time goes."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path
    """Folder of summary.md, summary.json, profile.html, config.json, env.json and the recording."""
    profiler: Literal["auto", "nsys", "torch"] = "auto"
    """auto: nsys where a GPU trains and nsys is on PATH, else torch.profiler. On a CPU nsys records
    calls of the operating system, the loader's operators and threads in place of operators."""
    warmup: int = 10
    """Steps before anything is measured: compilation, allocation, the loader's queue."""
    steps: int = 5
    """Steps that are profiled; as many before and after them are only timed."""
    inside_nsys: bool = False  # set by this command where it runs itself again under nsys


def main(argv: list[str]) -> int:
    if argv[:1] == ["diff"]:
        return diff(argv[1:])
    if not argv or argv[0] in ("-h", "--help"):
        return show_usage(f"{USAGE}\nm3i-fast recipes lists the recipes", asked=bool(argv))
    if {"-h", "--help"} & set(argv):
        _, default, _ = _default(argv)
        return show_usage(own_help("profile", typed_recipe(argv), default), asked=True)
    name, command, typed = parse(argv)
    expect_folder(command.out, "--out")
    if not command.inside_nsys and (command.out / "summary.json").exists():
        raise FileExistsError(f"--out: {command.out} holds a profile: name another folder")
    run = resolve(name, command, typed, argv)
    from m3i_fast.profiling.profile_run import measure_inside_nsys, write_profile

    if command.inside_nsys:
        measure_inside_nsys(run)
        return 0
    summary = write_profile(run, command.profiler)
    if summary is not None:
        for note in summary["notes"]:
            logger.warning("%s", note)
        written = f"{command.out / 'summary.md'}, {command.out / 'profile.html'}"
        console.print(written, highlight=False, soft_wrap=True)
    return 0


def parse(argv: list[str]) -> tuple[str, ProfileCommand, frozenset[str]]:
    """Return the recipe's name, what is asked for, and the flags that were typed.

    Raises as `find_recipe` and `read_flags`.
    """
    name, default, rest = _default(argv)
    command = read_flags(
        ProfileCommand, rest, prog=f"m3i-fast profile {typed_recipe(argv)}", default=default
    )
    return name, command, typed_flags(rest)


def _default(argv: list[str]) -> tuple[str, ProfileCommand, list[str]]:
    """Return the recipe's name, its command without flags, and the other arguments."""
    name, config, rest = find_recipe(argv)
    return name, ProfileCommand(config=config, out=Path("runs") / f"profile-{name}"), rest


def resolve(
    recipe: str, command: ProfileCommand, typed: frozenset[str], argv: list[str]
) -> ProfileRun:
    """Return the run to profile, with what its data decide.

    Raises ValueError for steps that the run has not, and as `take_data_fields`.
    """
    from m3i_fast.engine.run.data_fields import take_data_fields
    from m3i_fast.profiling.capture import Windows
    from m3i_fast.profiling.profile_run import ProfileRun

    windows = Windows(warmup=command.warmup, steps=command.steps)
    windows.expect_in(command.config.num_steps)
    return ProfileRun(
        recipe=recipe,
        config=take_data_fields(command.config, typed),
        windows=windows,
        out=command.out,
        arguments=argv,
    )


def diff(argv: list[str]) -> int:
    """Print what makes one of two profiles slower than the other."""
    if len(argv) != 2 or argv[0] in ("-h", "--help"):
        return show_usage(USAGE, asked=argv[:1] in (["-h"], ["--help"]))
    from m3i_fast.profiling.diff import compare_profiles, markdown
    from m3i_fast.profiling.summary import read_summary

    print(markdown(compare_profiles(*(read_summary(Path(name)) for name in argv))))  # noqa: T201  piped
    return 0
