"""Columns of a table, a data set or a JSON object: which holds what, guessed by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from m3i_fast.pipelines.packing.items import SourceOptions
from m3i_fast.pipelines.packing.readers.folders import is_picture
from m3i_fast.pipelines.packing.readers.named_columns import expect_columns, specs_of

IMAGE = r"image|images?_?(path|file|name|filename)?|img(_?path|_?file)?|file(_?name|_?path)?|path"
IMAGE += r"|picture|photo|jpg|png|webp|image_?bytes|bytes"
NOT_FETCHED = "pictures are not fetched: download them, by img2dataset for example"
URL = r"(image_?|img_?)?(url|uri|link)s?"
CAPTION = r"captions?([_-]?\w+)?"
SURE_CAPTION = r"captions?[_-]?\d*"
OTHER_CAPTION = r"text|title|description|alt(_?text)?|sentences?|prompt|txt"
NUMBERS, PICTURES = "numbers", "pictures"
LABEL = r"labels?|class(_?name|_?id)?|category|categories|target|cls|fine_label|label_?(id|name)"
GROUP = r"group(_?id)?|cluster(_?id)?"
SPLIT = r"split|subset"
NUMBER_TYPE = re.compile(
    r"(?:(?:large_|fixed_size_)?list<\w+: )*(?:u?int\d|float|double|halffloat|bool|decimal)"
)
"""What the name of an Arrow type of numbers, or of lists of them, begins with."""


class Columns(NamedTuple):
    """The columns of a source by what they hold; None or empty: there is none."""

    image: str
    captions: tuple[str, ...]
    label: str | None
    group: str | None
    split: str | None

    def said(self) -> str:
        """Say the choice, with the flags that change it."""
        captions = ", ".join(self.captions) or "none"
        return (
            f"columns: picture {self.image} (--image-column), captions {captions} "
            f"(--caption-column), label {self.label or 'none'} (--label-column), group "
            f"{self.group or 'none'} (--group-column), split {self.split or 'none'} "
            "(--split-column)"
        )


def choose_columns(
    names: Sequence[str],
    options: SourceOptions,
    where: str,
    kind_of: Callable[[str], str],
) -> Columns:
    """Choose the columns that flags name, or else those that are called so.

    An empty text as a flag's value stands for none; what --column names is not guessed, nor is
    caption_id for captions, where it holds numbers. Without a column that is called like a
    picture's the first one that holds pictures is taken. kind_of: NUMBERS, PICTURES or "". Raises
    ValueError where a column that a flag names is not there, or none is a picture's.
    """
    there = ", ".join(names)

    specs = specs_of(options.columns)
    expect_columns(specs, names, where)
    taken = {source for spec in specs for source in spec.sources}
    left = [name for name in names if name not in taken]

    def one(flag: str, asked: str | None, pattern: str) -> str | None:
        if asked is not None:
            if asked and asked not in names:
                raise ValueError(f"{flag}: expected one of {there} ({where}), got {asked}")
            return asked or None
        return next((name for name in left if _called(name, pattern)), None)

    image = one("--image-column", options.image_column, IMAGE)
    if options.image_column is None and not any("." in name for name in names):
        image = image or next((name for name in left if kind_of(name) == PICTURES), None)
    if image is None:
        raise ValueError(
            f"{where}: expected a column with the path or bytes of a picture, got {there}; "
            f"{_advice(names)}"
        )
    if options.caption_columns:
        captions = tuple(name for name in options.caption_columns if name)
        for name in captions:
            one("--caption-column", name, CAPTION)
    else:
        captions = tuple(
            name
            for name in left
            if _called(name, CAPTION)
            and name != image
            and (_called(name, SURE_CAPTION) or kind_of(name) != NUMBERS)
        )
        if not captions:
            captions = tuple(name for name in left if _called(name, OTHER_CAPTION))[:1]
    label = one("--label-column", options.label_column, LABEL)
    group = one("--group-column", options.group_column, GROUP)
    return Columns(
        image, captions, label, group, one("--split-column", options.split_column, SPLIT)
    )


def kind_of_type(schema: Any, name: str) -> str:
    """Return what a column of an Arrow schema holds by its type: numbers or lists, or pictures."""
    kind = str(schema.field(name).type)
    if NUMBER_TYPE.match(kind):
        return NUMBERS
    return PICTURES if kind.startswith(("binary", "large_binary", "struct<bytes: binary")) else ""


def kind_of_cells(cells: Sequence[Any]) -> str:
    """Return what the first cells of a column hold: all of them numbers, or paths of pictures."""
    if cells and all(map(_is_number, cells)):
        return NUMBERS
    are_paths = all(isinstance(cell, str) and is_picture(Path(cell.strip())) for cell in cells)
    return PICTURES if cells and are_paths and not any("://" in cell for cell in cells) else ""


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _advice(names: Sequence[str]) -> str:
    """Say what to do where no column is called like a picture's."""
    if any("." in name for name in names):
        return "where the first line has no names but a picture, write a line of names before it"
    if any(_called(name, URL) for name in names):
        return NOT_FETCHED
    return "name it by --image-column"


def _called(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern, re.sub(r"\s+", "_", name.strip()), re.IGNORECASE) is not None
