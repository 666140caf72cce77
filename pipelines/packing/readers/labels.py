"""Labels as a source has them, names or indices, made classes of."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from m3i_fast.pipelines.packing.items import Listing, Refused, printable

MOST_CLASSES = 1 << 20
"""Most classes that indices may stand for: a classifier has a row for each."""
_MENDED = "mend the label, or leave it empty"
_NOT_INDICES = f"{_MENDED}; where numbers are names, as of taxa, say --label-as name"
_WHOLE_FLOAT = re.compile(r"-?\d+\.0", re.ASCII)


def assign_labels(
    listing: Listing,
    raw: Sequence[object],
    *,
    class_names: Sequence[str] = (),
    label_as: str = "auto",
) -> None:
    """Give each item of a listing the label that its source has, and refuse those out of range.

    raw: of each item; None or an empty text: no label. class_names: all classes, where they are
    known; otherwise names are sorted, and indices go up to the largest. label_as: "name", "index",
    or "auto": indices where all are whole numbers and no known class is called so. Where all are
    written as 1.0, as pandas writes a column of numbers with empty cells, they are whole numbers.
    """
    known = {name: i for i, name in enumerate(class_names)}
    texts = [_text(label) for label in raw]
    if label_as == "index" or (label_as == "auto" and not set(texts) - {""} <= known.keys()):
        texts = _whole_numbers(texts)
    present = {text for text in texts if text}
    if not present:
        listing.class_names = tuple(class_names)
        return
    as_index = label_as == "index" or (
        label_as == "auto" and all(map(_is_integer, present)) and not present <= known.keys()
    )
    if as_index:
        limit = len(class_names) or MOST_CLASSES
        number = {text: int(text) for text in present if _is_integer(text)}
        number = {text: n for text, n in number.items() if -1 <= n < limit}
        mended = _NOT_INDICES
        expected = f"an index from 0 to {limit - 1}, or -1 for none"
        most = max(number.values(), default=-1)
        listing.class_names = tuple(class_names) or tuple(map(str, range(most + 1)))
    else:
        number = known or {name: i for i, name in enumerate(sorted(present))}
        mended = _MENDED
        expected = f"one of {len(number)} classes"
        listing.class_names = tuple(printable(name) for name in number)
    kept = []
    for item, text in zip(listing.items, texts, strict=True):
        if text and text not in number:
            got = printable(text[:40])
            listing.refuse(item.name, f"label: expected {expected}, got {got!r}", mended)
        else:
            kept.append(item._replace(label=number[text] if text else -1))
    listing.items = kept
    kind = "indices" if as_index else "names"
    listing.notes.append(f"labels are {kind} of {len(listing.class_names)} classes (--label-as)")


def named_label(label: Any, known: Sequence[str] | None) -> Any:
    """Return the name of a class by its number, where a data set has the names of all.

    Raises Refused for what is no label, or none of these.
    """
    if isinstance(label, (dict, list)):
        raise Refused(
            "label: expected text or a number",
            "name another --label-column; a set of labels is read by --column NAME:labels=COLUMN",
        )
    if known is None or not isinstance(label, int):
        return label
    if label == -1:  # what the datasets library stores where there is none
        return None
    if not 0 <= label < len(known):
        raise Refused(
            f"label: expected 0 to {len(known) - 1}, got {label}", "mend the label, or store -1"
        )
    return known[label]


def _text(label: object) -> str:
    """Return a label as text: whole numbers without a point, as tables with gaps have them."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return ""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label).strip()


def _whole_numbers(texts: list[str]) -> list[str]:
    """Return the texts without the ".0" that each has, or as they are where one has none."""
    if all(_WHOLE_FLOAT.fullmatch(text) for text in texts if text):
        return [text.removesuffix(".0") for text in texts]
    return texts


def _is_integer(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdecimal() and len(digits) < 19
