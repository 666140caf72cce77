"""What the files of a sample say: its caption, its label, its group, and whether it can be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from m3i_fast.pipelines.dataset.annotations.tokenizer import TokenizerInfo
from m3i_fast.pipelines.dataset.pictures import FORMATS, check_header, decode, upright_size
from m3i_fast.pipelines.dataset.sample_table import NO_LABEL
from m3i_fast.pipelines.packing.caption_ids import cached_tokenizer, column_ids
from m3i_fast.pipelines.packing.readers.named_columns import Spec, read_value, specs_of

NO_GROUP = -1
MOST_CLASSES = 1 << 20
MOST_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where the facts about a picture stand, and how closely it is looked at.

    caption: "txt", "json:FIELD" or None. label: "cls", "json:FIELD" or None. group: "json:FIELD" or
    None. class_names: names by number; None: labels are numbers, or names that are numbered by the
    alphabet. tokenizer: of captions, which are not tokenised here, and of named columns, which are.
    named: columns beside these, NAME:KIND or NAME:KIND=FIELD,... of the json.
    """

    caption: str | None
    label: str | None
    group: str | None
    class_names: tuple[str, ...] | None
    max_pixels: int
    decode: bool
    tokenizer: TokenizerInfo
    named: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if of_files := [spec.name for spec in self.specs if spec.is_file]:
            raise ValueError(
                f"--column: expected fields of the tars' json, got a file for {of_files[0]}: "
                "m3i-fast data pack reads it"
            )
        plain = {"caption": ("txt",), "label": ("cls",), "group": ()}
        for name, files in plain.items():
            value = getattr(self, name)
            kind, _, of_json = (value or "").partition(":")
            if value is not None and value not in files and not (kind == "json" and of_json):
                expected = " or ".join([*files, "json:FIELD"])
                raise ValueError(f"--{name}-column: expected {expected}, got {value!r}")

    @cached_property
    def specs(self) -> list[Spec]:
        """Return the named columns; raises ValueError for a flag that is wrong."""
        return specs_of(self.named)


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
    named: dict[str, Any] = field(default_factory=dict)  # by named column, JSON; texts as ids


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
        _group(fields, columns), fault, _named(fields, image, columns),
    )  # fmt: skip


def _fields(files: Mapping[str, bytes], columns: Columns) -> dict[str, Any]:
    """Parse the json file, where a column is in it."""
    asked = [columns.caption, columns.label, columns.group]
    is_asked = columns.named or any(name and name.startswith("json:") for name in asked)
    if "json" not in files or not is_asked:
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
    name = columns.caption.partition(":")[2]
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"json: {name}: expected text, got {type(value).__name__}")
    try:
        value.encode()  # JSON may hold halves of characters, which no tokenizer takes
    except UnicodeEncodeError:
        raise ValueError(f"json: {name}: expected text, got half a surrogate pair") from None
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
    name = columns.group.partition(":")[2]
    value = fields.get(name)
    if value is None:
        return NO_GROUP
    if isinstance(value, (dict, list, float, bool)):
        raise ValueError(f"json: {name}: expected text or a whole number, got {value!r}")
    digest = hashlib.blake2b(json.dumps(value).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _named(fields: dict[str, Any], image: bytes, columns: Columns) -> dict[str, Any]:
    """Return what is known of named columns, as `named_columns.Described.row_of` takes it."""
    values = {}
    for spec in columns.specs:
        row = {source: fields.get(source) for source in spec.sources}
        if (value := read_value(spec, spec.of_row(row))) is not None:
            values[spec.name] = value
    if not values:
        return {}
    kinds = {spec.name: spec.kind for spec in columns.specs}
    made = cached_tokenizer(columns.tokenizer.num_merges, columns.tokenizer.context_length)
    return column_ids(made, kinds, values, lambda: upright_size(image), "cut")[0]
