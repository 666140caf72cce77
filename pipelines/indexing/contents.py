"""What the files of a sample say: its caption, its label, its group, and whether it can be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m3i_fast.pipelines.dataset.pictures import FORMATS, check_header, decode
from m3i_fast.pipelines.dataset.sample_table import NO_LABEL

NO_GROUP = -1
MOST_CLASSES = 1 << 20
MOST_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where the facts about a picture stand, and how closely it is looked at.

    caption: "txt", "json:FIELD" or None. label: "cls", "json:FIELD" or None. group: "json:FIELD" or
    None. class_names: names by number; None: labels are numbers, or names that are numbered by the
    alphabet.
    """

    caption: str | None
    label: str | None
    group: str | None
    class_names: tuple[str, ...] | None
    max_pixels: int
    decode: bool

    def __post_init__(self) -> None:
        plain = {"caption": ("txt",), "label": ("cls",), "group": ()}
        for name, files in plain.items():
            value = getattr(self, name)
            kind, _, field = (value or "").partition(":")
            if value is not None and value not in files and not (kind == "json" and field):
                expected = " or ".join([*files, "json:FIELD"])
                raise ValueError(f"--{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read of a sample."""

    image_format: str  # Pillow's
    height: int
    width: int
    caption: str  # empty: none
    label: int | str  # -1: none; text: the name of a class
    group: int  # hash of what says it; -1: none
    fault_of_pixels: str | None  # why the picture does not decode


def read_facts(files: Mapping[str, bytes], columns: Columns) -> Facts:
    """Read a sample's files, content by extension; raises ValueError where it cannot be used."""
    pictures = [extension for extension in files if extension in FORMATS]
    if len(pictures) != 1:
        raise ValueError(
            f"expected one picture ({', '.join(FORMATS)}), got {', '.join(files) or 'none'}"
        )
    image = files[pictures[0]]
    stored, height, width = check_header(
        lambda at, count: image[at : at + count], None, columns.max_pixels
    )
    if stored == "WEBP" and image[12:16] == b"VP8X" and image[20] & 2:
        raise ValueError("expected one picture, got a moving one (an animated WebP)")
    fault = None
    if columns.decode:
        try:
            decode(image, None, columns.max_pixels)
        except ValueError as error:
            fault = str(error)
    fields = _fields(files, columns)
    return Facts(
        stored, height, width, _caption(files, fields, columns), _label(files, fields, columns),
        _group(fields, columns), fault,
    )  # fmt: skip


def _fields(files: Mapping[str, bytes], columns: Columns) -> dict[str, Any]:
    """Parse the json file, where a column is in it."""
    asked = [columns.caption, columns.label, columns.group]
    if "json" not in files or not any(name and name.startswith("json:") for name in asked):
        return {}
    text = _text(files["json"], "json")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"json: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"json: expected an object, got {type(fields).__name__}")
    return fields


def _text(content: bytes, name: str) -> str:
    if len(content) > MOST_TEXT_BYTES:
        raise ValueError(f"{name}: expected at most {MOST_TEXT_BYTES} bytes, got {len(content)}")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8, got other bytes at {error.start}") from None


def _caption(files: Mapping[str, bytes], fields: dict[str, Any], columns: Columns) -> str:
    if columns.caption is None:
        return ""
    if columns.caption == "txt":
        return _text(files.get("txt", b""), "txt").strip()
    field = columns.caption.partition(":")[2]
    value = fields.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"json: {field}: expected text, got {type(value).__name__}")
    try:
        value.encode()  # JSON may hold halves of characters, which no tokenizer takes
    except UnicodeEncodeError:
        raise ValueError(f"json: {field}: expected text, got half a surrogate pair") from None
    return value.strip()


def _label(files: Mapping[str, bytes], fields: dict[str, Any], columns: Columns) -> int | str:
    """Return a label in range, or the name of a class that is not numbered yet."""
    if columns.label is None:
        return NO_LABEL
    value: object
    if columns.label == "cls":
        value = _text(files["cls"], "cls").strip() if "cls" in files else None
    else:
        value = fields.get(columns.label.partition(":")[2])
    if value is None or value == "":
        return NO_LABEL
    if isinstance(value, str):
        value = _number_of(value, columns)
    if isinstance(value, str):
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{columns.label}: expected a number or a name, got {value!r}")
    end = MOST_CLASSES if columns.class_names is None else len(columns.class_names)
    if not NO_LABEL <= value < end:
        raise ValueError(f"{columns.label}: expected a label from -1 to {end - 1}, got {value}")
    return value


def _number_of(name: str, columns: Columns) -> int | str:
    """Return the number that a text says, or that the class of this name has."""
    if columns.class_names is not None and name in columns.class_names:
        return columns.class_names.index(name)
    if name.removeprefix("-").isdecimal() and name.isascii() and len(name) < 20:
        return int(name)
    if columns.class_names is not None:
        raise ValueError(f"{columns.label}: expected the name or number of a class, got {name!r}")
    return name


def _group(fields: dict[str, Any], columns: Columns) -> int:
    if columns.group is None:
        return NO_GROUP
    field = columns.group.partition(":")[2]
    value = fields.get(field)
    if value is None:
        return NO_GROUP
    if isinstance(value, (dict, list, float, bool)):
        raise ValueError(f"json: {field}: expected text or a whole number, got {value!r}")
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
