"""JSON of files that others may have spoilt: one error, with the file, the place and what is there.

Shapes are held to the verdicts of the package jsonschema.
"""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from m3i_fast.json_files import misfit, read_json

TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    None: "null",
}
SHAPES: list[Any] = [
    *TYPES,
    (int, str, None),
    [int],
    [[str]],
    {"a": int},
    {"a?": int},
    {"a": int, str: float},
    {str: {"size": int, "sha256": str}},
    {"a": {"b?": [(int, bool)]}},
    ([{"a": str}], {str: [float]}),
]
LEAVES: list[Any] = [None, True, 0, 3, 0.5, "", "x", [], {}]
VALUES = [
    *LEAVES,
    *([x] for x in LEAVES),
    *([x, y] for x, y in itertools.product(LEAVES, repeat=2)),
    *({"a": x} for x in [*LEAVES, ["x"], [[1, True]], {"b": [1, True]}, {"b": ["x"]}]),
    *({"a": x, "z": y} for x, y in itertools.product(LEAVES, repeat=2)),
    *({"z": {"size": x, "sha256": y}} for x, y in itertools.product(LEAVES, repeat=2)),
]


def schema_of(shape: Any) -> dict[str, Any]:
    if isinstance(shape, tuple):
        return {"anyOf": [schema_of(option) for option in shape]}
    if isinstance(shape, list):
        return {"type": "array", "items": schema_of(shape[0])}
    if isinstance(shape, dict):
        named = {
            name.removesuffix("?"): schema_of(s) for name, s in shape.items() if name is not str
        }
        found = {"type": "object", "properties": named}
        found["required"] = [name for name in shape if name is not str and not name.endswith("?")]
        return found | {"additionalProperties": schema_of(shape[str]) if str in shape else True}
    return {"type": TYPES[shape]}


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
def test_a_shape_means_what_its_schema_means(shape: Any) -> None:
    validator = jsonschema.Draft202012Validator(schema_of(shape))
    verdicts = set()
    for value in VALUES:
        is_valid = validator.is_valid(value)
        assert (misfit(value, shape) is None) == is_valid, (value, misfit(value, shape))
        verdicts.add(is_valid)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        (b"[" * 100_000, dict, "damaged: objects and lists are nested too deeply"),
        (b'{"a":' * 100_000, dict, "damaged: objects and lists are nested too deeply"),
        (b"", dict, "damaged: Expecting value"),
        (b"\xff\xfe{", dict, "damaged: "),
        (b"1" * 5000, dict, "damaged: "),
        (b"[]", dict, "damaged: expected an object, got a list"),
        (b'{"files": {"x": {"size": "3"}}}', {"files": {str: {"size": int}}},
         "damaged: files.x.size: expected an integer, got '3'"),
        (b'{"files": {"x": {}}}', {"files": {str: {"size": int}}},
         "damaged: files.x.size: expected an integer, got nothing"),
        (b'{"rows": [1, true]}', {"rows": [int]},
         "damaged: rows[1]: expected an integer, got True"),
        (b'{"score": []}', {"score": (float, None)},
         "damaged: score: expected a number or null, got a list"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(
    tmp_path: Path, text: bytes, shape: Any, reason: str
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_json(path, shape)
    assert str(error.value).startswith(f"{path}: {reason}")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    for name, kind in (("fifo", "a fifo"), ("folder", "a directory"), ("socket", "a socket")):
        with pytest.raises(ValueError, match=f"{name}: expected a file, got {kind}"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="expected a file, got a device"):
        read_json(Path("/dev/zero"))
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_json(tmp_path / "link") == {}
