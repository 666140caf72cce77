"""Regions of pictures in what others write: cells of tables, fields of json, and COCO's files.

A region is an object with a box and a text. The box is `bbox` (x, y, width and height, as COCO has
it), `xyxy` (left, top, right, bottom), or four fields `x`, `y`, `width`, `height` (Visual Genome);
in pixels of the upright picture. The text is the first there is of TEXTS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from m3i_fast.pipelines.dataset.annotations.regions import MOST_REGIONS
from m3i_fast.pipelines.packing.items import Listing, Refused, is_missing, printable

FILES = (".json", ".jsonl")
TEXTS = ("text", "caption", "phrase", "sentence", "sentences", "name", "category")
NAMED = ("file_name", "filename", "image")
LISTED = ("regions", "objects", "annotations")
PIXELS, SHARES = "pixels", "shares"
_SIDES = ("x", "y", "width", "height")
_MENDED = "mend the region, or take it out"

Value = list[list[Any]]
"""Regions as an item has them: [PIXELS or SHARES, [top, left, bottom, right], text] of each."""


def read_regions(name: str, value: Any) -> Value | None:
    """Return the regions of a cell; None: they are not known. Raises Refused, which names `name`.

    value: a list of regions, an object of lists as Hugging Face stores a sequence of objects, or
    either as text of JSON. An empty list says that there are none.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Refused(
                f"{name}: not JSON: {error}", "mend the cell, or leave it empty"
            ) from None
    if value is None or is_missing(value):
        return None
    if isinstance(value, Mapping):
        value = _transposed(name, value)
    if not isinstance(value, (list, tuple)):
        raise Refused(
            f"{name}: expected a list of regions, got {type(value).__name__}",
            'write it as [{"bbox": [x, y, width, height], "text": "..."}]',
        )
    found = []
    for number, region in enumerate(value):
        where = f"{name}: region {number}"
        if not isinstance(region, Mapping):
            raise Refused(f"{where}: expected an object, got {type(region).__name__}", _MENDED)
        box = _box(where, region)
        found += [[PIXELS, box, text] for text in _texts(where, region)]
    if len(found) > MOST_REGIONS:
        raise Refused(
            f"{name}: expected at most {MOST_REGIONS} regions, got {len(found)}",
            "keep some of them",
        )
    return found


def shares_of(
    name: str, value: Value, size: tuple[int, int]
) -> list[tuple[list[float], str]]:  # height, width
    """Return (box in shares of the picture, text) of each region; raises Refused.

    A box may leave the picture by a pixel, by which annotations are rounded, and is clipped.
    """
    height, width = size
    found = []
    for number, (unit, box, text) in enumerate(value):
        if unit == SHARES:
            found.append((box, text))
            continue
        top, left, bottom, right = box
        clipped = [max(top, 0), max(left, 0), min(bottom, height), min(right, width)]
        inside = top >= -1 and left >= -1 and bottom <= height + 1 and right <= width + 1
        if not inside or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
            raise Refused(
                f"{name}: region {number}: expected a box inside the upright picture of {width} x "
                f"{height} pixels, got x {left:g} to {right:g} and y {top:g} to {bottom:g}",
                _MENDED,
            )
        shares = [clipped[0] / height, clipped[1] / width, clipped[2] / height, clipped[3] / width]
        found.append((shares, text))
    return found


def _transposed(name: str, lists: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the objects of an object of lists."""
    lengths = {key: len(value) if isinstance(value, list) else -1 for key, value in lists.items()}
    if not lengths or len(set(lengths.values())) > 1 or -1 in lengths.values():
        raise Refused(
            f"{name}: expected lists of one length, got lengths "
            + ", ".join(f"{key} {'none' if n < 0 else n}" for key, n in lengths.items()),
            "write a list of objects, one a region",
        )
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _box(where: str, region: Mapping[str, Any]) -> list[float]:
    """Return top, left, bottom and right in pixels; raises Refused."""
    field = next((key for key in ("bbox", "xyxy") if not is_missing(region.get(key))), "")
    given = region[field] if field else [region.get(side) for side in _SIDES]
    field = field or ", ".join(_SIDES)
    try:
        four = [float(each) for each in given]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        four = []
    if len(four) != 4:
        raise Refused(
            f"{where}: {field}: expected 4 numbers, got {printable(str(given)[:60])}",
            "write bbox as [x, y, width, height], or xyxy as [left, top, right, bottom]",
        )
    if not all(math.isfinite(each) for each in four):
        raise Refused(f"{where}: {field}: expected finite numbers, got {four}", _MENDED)
    left, top, right, bottom = four
    if field != "xyxy":
        right, bottom = left + right, top + bottom
    if not (left < right and top < bottom):
        expected = "left < right and top < bottom" if field == "xyxy" else "a width and height > 0"
        raise Refused(f"{where}: {field}: expected {expected}, got {four}", _MENDED)
    return [top, left, bottom, right]


def _texts(where: str, region: Mapping[str, Any]) -> list[str]:
    """Return the texts of a region, several of `sentences`; raises Refused."""
    field = next((key for key in TEXTS if not is_missing(region.get(key))), "")
    value = region.get(field)
    values = value if isinstance(value, (list, tuple)) else [value]
    # RefCOCO: sentences are objects
    texts = [each.get("sent") if isinstance(each, Mapping) else each for each in values]
    found = [text.strip() for text in texts if isinstance(text, str)]
    if not found or len(found) < len(texts) or not all(found):
        raise Refused(
            f"{where}: {field or 'text'}: expected a text, got {printable(repr(value)[:60])}",
            f"give each region a text as one of {', '.join(TEXTS)}",
        )
    return found


# ---- Files beside pictures -----------------------------------------------------------------------


def is_regions_file(source: str) -> bool:
    """Return whether what a flag names is a file of regions, and not a column."""
    return source.lower().endswith(FILES)


def regions_by_item(file: Path, listing: Listing) -> dict[str, list[Any]]:
    """Read a file of regions; return those of each item of a listing, by its name.

    The file is COCO's JSON, or has an object a picture: a list of JSON, or a line each (.jsonl).
    Such an object names its picture by one of NAMED, relative to the source or by its last part
    alone, or by `image_id` or `id`, a number that the file is called by (Visual Genome), and has a
    list as one of LISTED. A picture that is not named has regions that are not known. Raises
    ValueError, which names the file.
    """
    try:
        content = file.read_text(encoding="utf-8-sig")
        entries = list(_entries(content, is_lines=file.suffix.lower() == ".jsonl"))
    except OSError as error:
        raise ValueError(f"--column: {file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--column: {file}: {error}") from None
    items = _Names(item.name for item in listing.items)
    found: dict[str, list[Any]] = {}
    num_strange = 0
    for name, regions in entries:
        item = items.find(name)
        num_strange += item is None
        if item is not None:
            found.setdefault(item, []).extend(regions)
    if not found:
        first = f"{entries[0][0]!r}" if entries else "none"
        raise ValueError(
            f"--column: {file}: expected names of pictures such as {items.first!r}, got {first}"
        )
    listing.notes.append(
        f"{file.name}: regions of {len(found)} pictures"
        + (f"; {num_strange} entries name none that is there" if num_strange else "")
    )
    return found


class _Names:
    """Names of pictures, found by all of the name, its last part, or that without its suffix."""

    def __init__(self, names: Iterable[str]) -> None:
        self._whole = dict.fromkeys(names)
        self._by: dict[str, str | None] = {}  # None: two pictures are called so
        self.first = next(iter(self._whole), "")
        for name in self._whole:
            last = name.rpartition("/")[2]
            for key in {last, last.rpartition(".")[0]}:
                self._by[key] = name if key not in self._by else None

    def find(self, name: str) -> str | None:
        name = printable(name).removeprefix("./")
        if name in self._whole:
            return name
        if name in self._by and self._by[name] is None:
            raise ValueError(
                f"--column: expected names that one picture has, got {name!r} of several: write "
                "it relative to the source"
            )
        return self._by.get(name)


def _entries(content: str, *, is_lines: bool) -> Iterator[tuple[str, list[Any]]]:
    """Yield (name of a picture, its regions); raises ValueError."""
    if is_lines:
        lines = [line for line in content.splitlines() if line.strip()]
        yield from (_entry(f"line {n}", json.loads(line)) for n, line in enumerate(lines, 1))
        return
    whole = json.loads(content)
    if isinstance(whole, dict) and {"images", "annotations"} <= whole.keys():
        yield from _coco(whole)
        return
    if not isinstance(whole, list):
        raise ValueError(
            "expected COCO's images and annotations, or a list with an object a picture, got "
            f"{type(whole).__name__}"
        )
    yield from (_entry(f"entry {n}", entry) for n, entry in enumerate(whole))


def _entry(where: str, entry: Any) -> tuple[str, list[Any]]:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    listed = next((entry[key] for key in LISTED if key in entry), None)
    if isinstance(listed, Mapping):
        listed = _transposed(where, listed)
    if not isinstance(listed, list):
        raise ValueError(f"{where}: expected a list as one of {', '.join(LISTED)}")
    keys = (*NAMED, "image_id", "id")
    name = next((entry[key] for key in keys if isinstance(entry.get(key), (str, int))), None)
    if name is None:
        raise ValueError(f"{where}: expected the picture's name as one of {', '.join(keys)}")
    return str(name), listed


def _coco(whole: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the pictures of COCO's JSON; a region without a caption is told by its category."""
    try:
        categories = {each["id"]: each["name"] for each in whole.get("categories", ())}
        regions: dict[Any, list[Any]] = {each["id"]: [] for each in whole["images"]}
        for annotation in whole["annotations"]:
            region = dict(annotation)
            if not any(key in region for key in TEXTS):
                region["category"] = categories.get(region.get("category_id"))
            regions[annotation["image_id"]].append(region)
        yield from ((each["file_name"], regions[each["id"]]) for each in whole["images"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            "expected COCO's images (id, file_name), annotations (image_id, bbox, caption or "
            f"category_id) and categories (id, name), got none of {error}"
        ) from None
