"""m3i-fast checkpoint: list, verify and consolidate the checkpoints of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.table import Table
from rich.text import Text

from m3i_fast.cli import refuse
from m3i_fast.config.run_encoder import expect_run
from m3i_fast.terminal import make_console

if TYPE_CHECKING:  # torch takes seconds, and help does without
    from m3i_fast.engine.checkpoint.checkpoints import Checkpoint

console = make_console()


def ls(run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]], /) -> int:
    """List a run's checkpoints, and which is the best one by --keep-best.

    Args:
        run: Run directory, or the directory of its checkpoints.
    """
    from m3i_fast.engine.checkpoint.checkpoints import POINTER

    directory = _directory(run)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "saved", "ranks", "files", "MiB", "note"):
        table.add_column(column, justify="right" if column in ("step", "MiB") else "left")
    pointer = directory / POINTER
    newest = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    listed = _listed(directory)
    best, told = _best(directory, listed)
    for checkpoint in listed:
        files = [path for path in checkpoint.path.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        notes = ["latest"] if checkpoint.path.name == newest else []
        note = ", ".join([*notes, told] if checkpoint == best else notes)
        try:
            ranks = "1" if checkpoint.is_old else str(checkpoint.manifest()["num_ranks"])
            note = "layout without a manifest" if checkpoint.is_old else note
        except (ValueError, OSError) as error:
            ranks, note = "?", _within(checkpoint, str(error))
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.path.stat().st_mtime))
        cells = str(checkpoint.step), saved, ranks, str(len(files)), f"{size / 2**20:.2f}", note
        table.add_row(*cells)
    console.print(table)
    return 0


def _best(directory: Path, listed: Sequence[Checkpoint]) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint that --keep-best keeps, and what it is the best by."""
    from m3i_fast.engine.checkpoint.saver import best_of, score_of

    config = directory.parent / "config.json"
    metric = json.loads(config.read_text()).get("keep_best", "") if config.is_file() else ""
    best = best_of(listed) if metric else None
    if best is None:
        return None, ""
    sign = -1 if metric.startswith("+") else 1
    return best, f"best by {metric.removeprefix('+')}: {sign * score_of(best):.4g}"


def verify(path: tyro.conf.Positional[Path], /) -> int:
    """Read every byte and compare it with the manifest; exit code 1 if anything is damaged.

    Args:
        path: Run directory, the directory of its checkpoints, or one checkpoint.
    """
    from m3i_fast.engine.checkpoint.checkpoints import Checkpoint

    listed = [Checkpoint(path)] if _is_checkpoint(path) else _listed(_directory(path))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("step", "state"):
        table.add_column(column, justify="right" if column == "step" else "left")
    reasons = [checkpoint.damage() for checkpoint in listed]
    for checkpoint, reason in zip(listed, reasons, strict=True):
        good = "good" + ", as far as can be told without a manifest" * checkpoint.is_old
        text = Text(good, "green") if reason is None else Text(_within(checkpoint, reason), "red")
        table.add_row(str(checkpoint.step), text)
    console.print(table)
    return int(any(reasons))


def consolidate(
    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]],
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    /,
) -> int:
    """Write the model of a checkpoint, whole, into one file of safetensors.

    Args:
        checkpoint: One checkpoint, or a run directory, whose newest good one is taken.
        out: File to write, ending in .safetensors; it must not exist.
    """
    if out.suffix != ".safetensors":
        return refuse(f"OUT: expected a name ending in .safetensors, got {out}")
    if out.exists():
        return refuse(f"{out} exists already: name another file")
    from m3i_fast.engine.checkpoint.checkpoints import Checkpoint, latest
    from m3i_fast.export.weight_files import write_weights

    if _is_checkpoint(checkpoint):
        source = Checkpoint(checkpoint)
        source.verify()
    else:
        source = latest(_directory(checkpoint))
    if source.path.resolve() in out.resolve().parents:
        return refuse(f"OUT: expected a file outside of {source.path}, got {out}")
    tensors = source.shards("model").read()
    write_weights(out, tensors, step=str(source.step))
    console.print(f"wrote {len(tensors)} tensors of {source.path} to {out}", soft_wrap=True)
    return 0


def _is_checkpoint(path: Path) -> bool:
    from m3i_fast.engine.checkpoint.checkpoints import Checkpoint

    try:
        return Checkpoint(path).step >= 0 and path.is_dir()
    except ValueError:
        return False


def _directory(path: Path) -> Path:
    """Return the directory of the checkpoints in a run directory, or the path if it is one."""
    inside = path / "checkpoints"
    if inside.is_dir():
        return inside
    if not any(path.glob("step_*")):
        expect_run(path, "RUN")
    return path


def _listed(directory: Path) -> list[Checkpoint]:
    from m3i_fast.engine.checkpoint.checkpoints import checkpoints

    listed = checkpoints(directory)
    if not listed:
        raise FileNotFoundError(f"no checkpoint in {directory}: expected a directory step_00000000")
    return listed


def _within(checkpoint: Checkpoint, reason: str) -> str:
    """Return a reason with its files named from the checkpoint on."""
    return reason.replace(f"{checkpoint.path}/", "")


COMMANDS: dict[str, Callable[..., int]] = {"ls": ls, "verify": verify, "consolidate": consolidate}


def main(argv: list[str]) -> int:
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="m3i-fast checkpoint", args=argv)
