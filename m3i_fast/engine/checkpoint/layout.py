"""Layout of a checkpoint's directory: the files that its manifest names, and the shape of its JSON.

No other file is opened: a symbolic link or a fifo is refused by its name.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from m3i_fast.durable_files import kind_of
from m3i_fast.engine.checkpoint.shard_files import MANIFEST, VERSION
from m3i_fast.json_files import read_json

Shape = dict[Any, Any]
MANIFEST_SHAPE: Shape = {
    "version": int,
    "step": int,
    "num_ranks": int,
    "files": {str: {"size": int, "sha256": str}},
}
_RECORD: Shape = {"step": int, "reason": str, "losses": {str: float}, "gradients": {str: float}}
_MEANS: Shape = {"names": [str], "sums": [float], "count": float}
STATE_SHAPE: Shape = {
    "num_ranks?": int,
    "config?": {
        "data": {"batch_size": int, "max_tokens_per_batch?": int},
        "parallel?": {"accumulate?": int},
    },
    "loader?": {
        "version?": int,
        "samples?": int,
        "seed?": int,
        "dataset?": str,
        "split?": str,
        "order?": (int, str),
    },
    "random?": {"python": list, "numpy": list, "torch": str, "cuda?": str},
    "means?": ([_MEANS], {str: [float]}),
    "log?": {"score": (float, None)},
    "watch?": {str: float},
    "guard?": {"steps": [[(int, bool)]], "records": [_RECORD], "spikes": [float]},
    "skips?": {
        "recent": [int],
        "in_a_row": int,
        "total": int,
        "rollbacks": int,
        "scale": float,
        "scaled_until": int,
    },
}
"""Shape of a rank's state; older checkpoints lack keys that end in "?"."""


def read_manifest(directory: Path, step: int) -> dict[str, Any]:
    """Read the manifest of a step; raise ValueError naming what is wrong with it."""
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = read_json(path, MANIFEST_SHAPE)
    except FileNotFoundError:
        raise missing_file(path) from None
    if manifest["version"] != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {manifest['version']}")
    if manifest["step"] != step:
        raise ValueError(f"{path}: expected the files of step {step}, got step {manifest['step']}")
    if not manifest["files"]:
        raise ValueError(f"{path}: names no files")
    return manifest


def missing_file(path: Path) -> FileNotFoundError:
    """Return the error for a checkpoint that lacks a file."""
    return FileNotFoundError(f"{path}: missing; the checkpoint is not whole")


def expect_only(directory: Path, names: Collection[str], folders: Collection[str] = ()) -> None:
    """Raise an error for a directory that holds other files than these, or lacks one; open none.

    names: relative to the directory, those in `folders` as FOLDER/NAME. ValueError names unexpected
    entries, symbolic links and fifos included; FileNotFoundError names what is missing.
    """
    there, wrong = set(), []
    for entry in _entries(directory, folders):
        name = os.path.relpath(entry.path, directory)
        expected = "a file" if name in names else "a directory" if name in folders else "nothing"
        got = kind_of(entry.stat(follow_symlinks=False).st_mode)
        if got != expected:
            shown = name if name.isprintable() else repr(name)
            wrong.append(f"{shown}: expected {expected}, got {got}")
        there.add(name)
    if wrong:
        raise ValueError(f"{directory}: {'; '.join(wrong)}")
    for name in names:
        if name not in there:
            raise missing_file(directory / name)


def _entries(directory: Path, folders: Collection[str]) -> Iterator[os.DirEntry[str]]:
    """Yield all entries of a directory and of its real subdirectories named in `folders`."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            yield entry
            if entry.name in folders and entry.is_dir(follow_symlinks=False):
                yield from _entries(Path(entry.path), ())
