"""What cannot be used is left out and named, and the rest is used."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.pipelines.dataset.sample_table import BAD
from m3i_fast.pipelines.tar_members import sample_files
from tests.pipelines.indexing.tars import (
    GIF,
    JPEG,
    PNG,
    WEBP,
    Files,
    as_img2dataset,
    contents,
    index,
    refused,
    rows,
    write_tar,
)


def bomb() -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))


ANIMATED = WEBP[:4] + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\2" + bytes(9)
REFUSED: list[tuple[Files, dict[str, Any], str]] = [
    ([("x.txt", b"no picture")], {}, "expected one picture (jpg, jpeg, png, webp), got txt"),
    ([("x.seg.png", PNG)], {}, "expected one picture (jpg, jpeg, png, webp), got seg.png"),
    ([("x.jpg", JPEG), ("x.png", PNG)], {}, "expected one picture"),
    ([("x.jpg", JPEG), ("x.JPG", JPEG)], {}, "expected each file once, got two of jpg"),
    ([("x.gif", GIF)], {}, "expected one picture (jpg, jpeg, png, webp), got gif"),
    ([("x.jpg", GIF)], {}, "expected PNG, JPEG or WebP data, got b'GIF"),
    ([("x.jpg", b"")], {}, "expected PNG, JPEG or WebP data, got b''"),
    ([("x.jpg", b"<html>gone</html>")], {}, "expected PNG, JPEG or WebP data, got b'<html>"),
    ([("x.webp", ANIMATED)], {}, "a moving one (an animated WebP)"),
    ([("x.png", bomb())], {}, "expected at most 89478485 pixels, got 30000 x 30000"),
    ([("x.jpg", JPEG), ("x.txt", b"st\xe9")], {}, "txt: expected UTF-8, got other bytes at 2"),
    ([("x.jpg", JPEG), ("x.txt", b"x" * 2_000_000)], {}, "txt: expected at most 1048576 bytes"),
    ([("x.jpg", JPEG), ("x.json", b"{")], {"caption": "json:a"}, "json: "),
    ([("x.jpg", JPEG), ("x.json", b"[1]")], {"caption": "json:a"}, "expected an object, got list"),
    ([("x.jpg", JPEG), ("x.json", b"[" * 99999)], {"caption": "json:a"}, "json: "),
    (
        [("x.jpg", JPEG), ("x.json", b'{"a": 5}')],
        {"caption": "json:a"},
        "expected text, got int",
    ),
    ([("x.jpg", JPEG), ("x.json", b'{"a": "\\ud83d"}')], {"caption": "json:a"}, "surrogate"),
    ([("x.jpg", JPEG), ("x.cls", b"5")], {"class_names": ("a", "b")}, "label from -1 to 1, got 5"),
    ([("x.jpg", JPEG), ("x.cls", b"c")], {"class_names": ("a", "b")}, "name or number of a class"),
    ([("x.jpg", JPEG), ("x.cls", b"-2")], {}, "cls: expected a label from -1 to 1048575, got -2"),
    (
        [("x.jpg", JPEG), ("x.cls", b"9" * 15)],
        {},
        "label from -1 to 1048575, got 9",
    ),
    ([("x.jpg", JPEG), ("x.cls", b"\xff\0")], {}, "cls: expected UTF-8"),
    (
        [("x.jpg", JPEG), ("x.json", b'{"k": 1.5}')],
        {"label": "json:k"},
        "number or a name, got 1.5",
    ),
    ([("x.jpg", JPEG), ("x.json", b'{"g": [1]}')], {"group": "json:g"}, "text or a whole number"),
    ([("x.jpg", JPEG), ("y.jpg", JPEG), ("x.txt", b"z")], {}, "its key stands in this tar before"),
    ([("x.jpg", JPEG), (".x", b"z"), ("x.txt", b"z")], {}, "next to each other, got others"),
]


@pytest.mark.parametrize(("files", "settings", "reason"), REFUSED)
def test_a_sample_that_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, files: Files, settings: dict[str, Any], reason: str
) -> None:
    around = as_img2dataset(0, 2)
    write_tar(tmp_path / "a.tar", [*around[:3], *files, *around[3:]])
    manifest = index(tmp_path, **settings)
    (row,) = refused(tmp_path)
    assert (row["file"], row["sample"]) == ("a.tar", "x") and reason in row["reason"]
    keys = [sample_files(content)[0] for content in contents(tmp_path)]
    assert [key for key in keys if key not in "xy"] == ["000000000", "000000001"]
    assert manifest.splits["train"].num_samples == len(keys) == 2 + ("before" in reason) * 2


def test_a_link_is_no_file_of_a_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [("a.jpg", None), ("b.txt", None), ("b.jpg", tarfile.SYMTYPE)]:
            member = tarfile.TarInfo(name)
            if kind is None:
                member.size = len(JPEG)
            else:
                member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member, io.BytesIO(JPEG) if kind is None else None)
    index(tmp_path)
    assert [(r["sample"], r["reason"]) for r in refused(tmp_path)] == [
        ("b", "b.jpg: expected a file, got a link or a device")
    ]


def test_nothing_usable_is_said_with_its_reason(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", GIF), ("b.jpg", GIF), ("c.txt", b"")])
    with pytest.raises(ValueError, match=r"can be used in 1 tars, got none: 2 x corrupt or empty"):
        index(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_picture_that_does_not_decode_is_flagged_and_keeps_its_place(tmp_path: Path) -> None:
    files = as_img2dataset(0, 4)
    files[3] = (files[3][0], files[3][1][:-40])
    write_tar(tmp_path / "a.tar", files)
    assert index(tmp_path).splits["train"].num_bad == 0  # its header is good
    before = rows(tmp_path).copy()
    split = index(tmp_path, decode=True).splits["train"]
    assert (split.num_samples, split.num_bad, split.num_captions) == (4, 1, 3)
    assert rows(tmp_path)["flags"].tolist() == [0, BAD, 0, 0]
    for column in ("offset", "sample_id", "crc32c"):
        assert rows(tmp_path)[column].tolist() == before[column].tolist()
    (row,) = refused(tmp_path)
    assert row["flagged"] and row["sample"] == "000000001" and "corrupt" in row["reason"]


@pytest.mark.parametrize("where", ["header", "content", "text", "trailer", "border", "none"])
def test_of_a_tar_that_is_cut_off_the_samples_before_are_used(tmp_path: Path, where: str) -> None:
    whole = write_tar(tmp_path / "b.tar", as_img2dataset(0, 4)).read_bytes()
    write_tar(tmp_path / "a.tar", as_img2dataset(9, 2))
    with tarfile.open(tmp_path / "b.tar") as tar:
        jpg, facts, text = tar.getmembers()[6:9]  # of the third sample
        last = tar.getmembers()[-1]
    end = {
        "header": jpg.offset + 100,
        "content": jpg.offset_data + 200,
        "text": text.offset_data + 3,
        "border": facts.offset,
        "trailer": last.offset_data + 512,
        "none": 0,
    }[where]
    (tmp_path / "b.tar").write_bytes(whole[:end])
    index(tmp_path)
    keys = [sample_files(content)[0] for content in contents(tmp_path)]
    # The last sample whose files are whole may lack some.
    kept = {"header": 1, "content": 1, "trailer": 3, "none": 0}.get(where, 2)
    assert keys == ["000000009", "000000010", *(f"{i:09d}" for i in range(kept))]
    of_tar, *of_samples = refused(tmp_path)
    assert (of_tar["file"], of_tar["sample"]) == ("b.tar", None)
    assert "cut off at byte" in of_tar["reason"] or "expected an uncompressed" in of_tar["reason"]
    assert [row["sample"] for row in of_samples] == ([f"{kept:09d}"] if where != "none" else [])


@pytest.mark.parametrize("content", [b"<html>not found</html>" * 99, bytes(10240)])
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes) -> None:
    write_tar(tmp_path / "a.tar", as_img2dataset(0, 2))
    (tmp_path / "b.tar").write_bytes(content)
    index(tmp_path)
    expected = ["expected an uncompressed tar, got other bytes"] if any(content) else []
    assert [row["reason"].partition(":")[0] for row in refused(tmp_path)] == expected


def test_a_header_that_is_damaged_does_not_end_a_tar_silently(tmp_path: Path) -> None:
    """tarfile takes it for the end, and webdataset the rest for nothing."""
    tar = write_tar(tmp_path / "a.tar", as_img2dataset(0, 4))
    with tarfile.open(tar) as opened:
        offset = opened.getmembers()[6].offset
    content = bytearray(tar.read_bytes())
    content[offset + 5] ^= 1
    tar.write_bytes(content)
    index(tmp_path)
    assert len(rows(tmp_path)) == 1
    of_tar, of_sample = refused(tmp_path)
    assert f"damaged at byte {offset}" in of_tar["reason"] and of_sample["sample"] == "000000001"


@pytest.mark.parametrize(
    ("of_all", "name", "reason"),
    [
        # The bytes of one sample would not tell its name.
        ({"path": "x.jpg"}, "short", "expected a 'path' of one file, got one of all that follow"),
        ({"comment": "as of git archive"}, "x.jpg", None),
    ],
)
def test_a_header_of_all_files_may_not_name_them(
    tmp_path: Path, of_all: dict[str, str], name: str, reason: str | None
) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(JPEG)
    file = tmp_path / "b.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT, pax_headers=of_all) as tar:
        tar.addfile(member, io.BytesIO(JPEG))
    write_tar(tmp_path / "a.tar", as_img2dataset(0, 1))
    index(tmp_path)
    assert len(rows(tmp_path)) == (1 if reason else 2)
    said = [row["reason"] for row in refused(tmp_path)]
    assert len(said) == bool(reason) and all(reason and reason in text for text in said)
