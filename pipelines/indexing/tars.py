"""The tars of a folder: which there are, which split each is of, and what their samples hold."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from m3i_fast.pipelines.indexing.scan import scan
from m3i_fast.pipelines.indexing.tar_places import Tars, told_compressed, with_compressed
from m3i_fast.pipelines.packing.readers.tars import COMPRESSED

LOOKED_AT = 100  # samples, to guess columns
CAPTIONS, LABELS = ("caption", "text"), ("label", "class", "cls")


def find_tars(root: Path, patterns: Sequence[str]) -> list[str]:
    """Return the names of the tars in `root` that fit a pattern, relative to it and sorted.

    A pattern is relative to root, or absolute and inside of it. Raises ValueError for one that
    leads out of root, a tar that is a link to the outside, and where nothing fits.
    """
    inside = root.resolve()
    names = set()
    for pattern in patterns:
        for file in _matching(root, _relative(root, pattern), (".tar",)):
            name = file.relative_to(root)
            if not file.resolve().is_relative_to(inside):
                raise ValueError(
                    f"{file}: expected a tar in {root}, got a link to {file.resolve()}; name the "
                    "folder with the tars themselves"
                )
            if file.is_file():
                names.add(name.as_posix())
    if not names:
        got = told_compressed(find_compressed(root, patterns)) or "none"
        raise ValueError(f"{root}: expected tars ({', '.join(patterns)}), got {got}")
    return sorted(names)


def find_compressed(root: Path, patterns: Sequence[str]) -> list[str]:
    """Return the names of the compressed tars beside those that `find_tars` looks for, sorted."""
    found = {
        file.relative_to(root).as_posix()
        for pattern in patterns
        for each in with_compressed(_relative(root, pattern))
        for file in _matching(root, each, COMPRESSED)
    }
    return sorted(found)


def _relative(root: Path, pattern: str) -> str:
    """Return a pattern relative to root; ValueError for one that leads out of it."""
    relative = Path(pattern)
    if relative.is_absolute():
        for base in (root.absolute(), root.resolve()):
            if relative.is_relative_to(base):
                relative = relative.relative_to(base)
                break
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"--tars: expected tars in {root}, got {pattern!r}: name their folder")
    return str(relative)


def _matching(root: Path, pattern: str, endings: tuple[str, ...]) -> Iterator[Path]:
    """Yield what fits a pattern and has one of the endings, hidden files and folders left out."""
    for file in root.glob(pattern):
        parts = file.relative_to(root).parts
        if file.name.endswith(endings) and not any(part.startswith(".") for part in parts):
            yield file


class Guess(NamedTuple):
    """Columns that samples of the first tar have."""

    caption: str | None
    label: str | None


def guess_columns(tars: Tars, names: Sequence[str]) -> Guess:
    """Look at the first samples of the first tar that has any."""
    counts: Counter[str] = Counter()
    for name in names:
        tar = tars.open(name)
        try:
            samples, _ = scan(tar, tars.num_bytes(name), LOOKED_AT)
            for part in (part for found in samples for part in found.parts):
                counts[part.extension] += 1
                if part.extension == "json":
                    content = tar.pread(part.size, part.offset)
                    counts.update(f"json:{field}" for field in _useful_fields(content))
        finally:
            tar.close()
        if samples:
            break
    captions = ("txt", *(f"json:{field}" for field in CAPTIONS))
    labels = ("cls", *(f"json:{field}" for field in LABELS))
    return Guess(
        next((column for column in captions if counts[column]), None),
        next((column for column in labels if counts[column]), None),
    )


def _useful_fields(content: bytes) -> list[str]:
    """Return the fields of a json file that may be captions or labels."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return []
    if not isinstance(fields, dict):
        return []
    texts = [name for name in CAPTIONS if isinstance(fields.get(name), str)]
    return texts + [name for name in LABELS if isinstance(fields.get(name), (str, int))]
