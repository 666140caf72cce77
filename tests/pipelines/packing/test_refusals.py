"""Bad input: each file is named with its reason and what to do, and nothing wrong is taken."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
import torchvision
from pyarrow import parquet

from m3i_fast import durable_files
from tests.pipelines.packing.helpers import (
    labels_of,
    pack_with,
    picture,
    put,
    refused_file,
    refused_of,
    rows_of,
)

GOOD = picture(0)


def test_a_folder_of_bad_files_names_each(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, "good.png", GOOD)
    put(source, "cut.png", GOOD[:-200])
    put(source, "empty.jpg", b"")
    put(source, "page.gif", b"<html>")
    put(source, "new\nline [b].png", b"x")
    put(tmp_path, "elsewhere/secret.png")
    (source / "link.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (source / "same.png").symlink_to("good.png")
    (source / "nowhere.png").symlink_to("not-there.png")
    (source / "round").symlink_to(source)
    (source / "outside").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(source / "pipe.png")
    packed = pack_with(source, tmp_path / "out")
    found = refused_of(packed)
    assert found.pop("cut.png").startswith("corrupt or empty image")
    assert found == {
        "empty.jpg": "an empty file",
        "page.gif": "not a picture: begins with b'<html>'",
        "new\\nline [b].png": "not a picture: begins with b'x'",
        "link.png": "a symbolic link out of the source's folder",
        "nowhere.png": "a symbolic link to a file that is not there",
        "round": "a symbolic link to a folder, which is not followed",
        "outside": "a symbolic link to a folder, which is not followed",
        "pipe.png": "expected a file, got a device, pipe or folder",
    }
    assert [row.image for row in rows_of(tmp_path / "out")] == [GOOD, GOOD]
    written = refused_file(tmp_path / "out")
    assert [line["file"] for line in written] == [refusal.file for refusal in packed.refused]
    assert all(line["reason"] and line["what_to_do"] for line in written)
    allowed = pack_with(source, tmp_path / "allowed", allow_outside=True)
    assert "link.png" not in refused_of(allowed)
    assert refused_of(allowed)["round"] == "a folder whose pictures are read by another name"
    assert "outside" not in refused_of(allowed)
    assert len(rows_of(tmp_path / "allowed")) == 4


def test_folders_of_classes_that_are_links_are_followed_where_that_is_allowed(
    tmp_path: Path,
) -> None:
    """As torchvision's ImageFolder follows them, but for a folder that was entered already."""
    source = tmp_path / "source"
    put(source, "ant/0.png")
    put(source, "bee/0.png")
    put(tmp_path, "elsewhere/cats/0.png")
    put(tmp_path, "elsewhere/cats/more/1.png")
    (source / "cat").symlink_to(tmp_path / "elsewhere/cats")
    classes = torchvision.datasets.ImageFolder(source).classes
    (tmp_path / "elsewhere/cats/round").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/cats/back").symlink_to(source)
    (source / "same").symlink_to("ant")
    packed = pack_with(source, tmp_path / "out", kind="imagefolder", allow_outside=True)
    assert packed.manifest.class_names == tuple(classes) == ("ant", "bee", "cat")
    assert labels_of(tmp_path / "out") == ["ant", "bee", "cat", "cat"]
    again = "a folder whose pictures are read by another name"
    assert refused_of(packed) == dict.fromkeys(("same", "cat/back", "cat/round/cats"), again)
    refused = refused_of(pack_with(source, tmp_path / "not_followed", kind="imagefolder"))
    assert set(refused) == {"cat", "same"}


@pytest.mark.parametrize("parents", [("",), ("train/", "val/")])
def test_folders_without_a_picture_are_named(
    parents: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    for parent in parents:
        for name in ("ant", "bee"):
            put(source, f"{parent}{name}/0.png")
        put(source, f"{parent}heic/0.heic", b"")
        put(source, f"{parent}text/a.txt", b"")
        put(source, f"{parent}.git/config", b"")
    (source / parents[0] / "zebra").mkdir()
    put(source, f"{parents[-1]}bird/0.png")
    (source / parents[0] / "bird").mkdir(exist_ok=True)
    packed = pack_with(source, tmp_path / "out")
    assert packed.manifest.class_names == ("ant", "bee", "bird")
    said = " ".join(capsys.readouterr().err.split())
    assert "folders without a picture that is read, which are no classes: heic, text, zebra" in said


def test_pictures_of_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    """By what they are called; a folder of nothing else is not taken for an empty one."""
    for name in ("a.png", "IMG_1.HEIC", "b/logo.svg", "raw.cr2", "x.icns"):
        put(tmp_path / "source", name, GOOD)
    packed = pack_with(tmp_path / "source", tmp_path / "out")
    assert refused_of(packed) == {
        "IMG_1.HEIC": "HEIC pictures are not read",
        "b/logo.svg": "SVG pictures are not read",
        "raw.cr2": "camera raw pictures are not read",
        "x.icns": "ICNS pictures are not read",
    }
    put(tmp_path / "only", "IMG_1.HEIC")
    with pytest.raises(ValueError, match="expected a picture that can be used, got none of 1"):
        pack_with(tmp_path / "only", tmp_path / "none")
    put(tmp_path / "text", "a.txt")
    with pytest.raises(ValueError, match=r"got none: 1 files are not called like .*: 1 \.txt"):
        pack_with(tmp_path / "text", tmp_path / "none")
    with pytest.raises(ValueError, match=r"got .*a\.png; name its folder"):
        pack_with(tmp_path / "source" / "a.png", tmp_path / "none")


def test_hidden_folders_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat/0.png", "dog/0.png", ".ipynb_checkpoints/0.png", "cat/.git/0.png"):
        put(tmp_path / "source", name)
    pack_with(tmp_path / "source", tmp_path / "out")
    assert labels_of(tmp_path / "out") == ["cat", "dog"]
    said = " ".join(capsys.readouterr().err.split())
    for name in (".ipynb_checkpoints", "cat/.git"):
        assert f"{name} is a hidden folder, which is not looked into" in said


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (b"a.png,cat\nb.png,dog\n", "write a line of names before it"),
        (b"url,caption\nhttps://example.org/a.png,cat\n", "pictures are not fetched: download"),
        (b"one,two\na,cat\n", "name it by --image-column"),
        (b"one,two\nhttps://example.org/a.png,cat\n", "name it by --image-column"),
    ],
)
def test_a_table_without_a_column_of_pictures_says_what_to_do(
    tmp_path: Path, table: bytes, said: str
) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(ValueError, match=f"path or bytes of a picture, got .*{said}"):
        pack_with(put(tmp_path, "t.csv", table), tmp_path / "out")


def test_paths_of_windows_are_refused_with_what_to_write(tmp_path: Path) -> None:
    put(tmp_path, "cat/a.png")
    put(tmp_path, "b.png")
    table = put(tmp_path, "t.csv", b"file\ncat\\a.png\nb.png\n")
    (refusal,) = pack_with(table, tmp_path / "out").refused
    assert refusal.what_to_do == "write paths with / in place of \\"


def test_names_that_are_not_utf8_are_packed_and_printed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name, content in ((b"K\xf6ln.png", GOOD), (b"\xff\xfe.png", b"")):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "source"), name))).write_bytes(content)
    packed = pack_with(tmp_path / "source", tmp_path / "out")
    assert refused_of(packed) == {"\\udcff\\udcfe.png": "an empty file"}


TABLE = b"""file,caption,label,group
a.png,fine,0,
b.png,K\xf6ln,1,
../outside.png,fine,1,
/etc/hostname,fine,1,
c.png,fine,3,
d.png,fine,-2,
missing.png,fine,1,
,fine,1,
a.png,again,0,
e.png,fine,1
f.png,fine,-1,
g.png,fine,1.5,
h.png,%s,1,
"""


def test_rows_of_a_table_are_refused_by_line(tmp_path: Path) -> None:
    for name in "abcdefgh":
        put(tmp_path / "source", f"{name}.png", GOOD)
    put(tmp_path, "outside.png", GOOD)
    table = put(tmp_path / "source", "t.csv", TABLE % (b"x" * 501))
    classes = put(tmp_path, "classes.txt", b"cat\ndog\nox\n")
    packed = pack_with(table, tmp_path / "out", class_names=classes, label_as="index")
    found = refused_of(packed)
    assert {name: reason.split(":")[0].split(",")[0] for name, reason in found.items()} == {
        "t.csv:3": "caption",
        "t.csv:4": "a path out of the source's folder",
        "t.csv:5": "a path out of the source's folder",
        "c.png": "label",
        "d.png": "label",
        "t.csv:8": "missing.png",
        "t.csv:9": "expected the path of a picture",
        "t.csv:10": "a.png",
        "t.csv:11": "expected 4 cells",
        "g.png": "label",
    }
    assert "not UTF-8" in found["t.csv:3"]
    assert found["c.png"] == "label: expected an index from 0 to 2, or -1 for none, got '3'"
    assert labels_of(tmp_path / "out") == ["cat", None, "dog"]
    put(tmp_path / "source", "page.png", b"<html>")
    only = put(tmp_path / "source", "u.csv", b"file\npage.png\n")
    with pytest.raises(ValueError, match="split train: expected a picture .*: page.png: not a pic"):
        pack_with(only, tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a column with the path or bytes of a picture"),
        (b"a,b\n1,2\n", "expected a column with .*, got a, b; name it by --image-column"),
        (b"file,file\n", "expected a name once in its first line, got file, file"),
        (
            b'file,caption\na.png,"not closed\nb.png,fine\n',
            "line 3: .*a quotation mark that is not",
        ),
        (b'file,caption\na.png,"odd" mark\n', "line 2: .*a quotation mark that is not"),
        (b"file\n", "expected a picture that can be used, got none of 0"),
        (b"\xff\xfef\0i\0l\0e\0", "expected a column"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Before anything is written; a quotation mark would take the rows after it into a caption."""
    with pytest.raises(ValueError, match=message):
        pack_with(put(tmp_path, "t.csv", content), tmp_path / "out")
    assert not (tmp_path / "out").exists()


STRANGE: dict[str, dict[str, Any]] = {
    "path": {"file": "\ud800.png"},
    "group": {"group": "\ud800"},
    "object": {"group": {"a": 1}},
    "number": {"size": 10**400},
    "regions": {"boxes": [{"bbox": [0, 0, 10**400, 1], "text": "x"}]},
}


@pytest.mark.parametrize("case", STRANGE)
def test_a_cell_of_json_that_nothing_can_hold_is_refused_with_its_row(
    case: str, tmp_path: Path
) -> None:
    region = {"bbox": [0, 0, 9, 9], "text": "x"}
    rows: list[dict[str, Any]] = []
    for name in "abc":
        put(tmp_path, f"{name}.png", GOOD)
        rows.append({"file": f"{name}.png", "group": name, "size": 1, "boxes": [region]})
    rows[1] |= STRANGE[case]
    table = put(tmp_path, "t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    columns = ("size:numbers", "boxes:regions")
    (refusal,) = pack_with(table, tmp_path / "out", column=columns).refused
    assert refusal.file == ("b.png" if case in ("number", "regions") else "t.jsonl:2")
    assert refusal.reason and refusal.what_to_do and len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_a_time_that_python_has_no_number_for_is_refused_with_its_row(
    kind: str, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    for row in range(3):
        put(source, f"{row}.png", GOOD)
    times = pyarrow.array([0, 2**50, 0], pyarrow.timestamp("s"))
    table = pyarrow.table({"file": [f"{row}.png" for row in range(3)], "group": times})
    if kind == "parquet":
        parquet.write_table(table, source / "t.parquet")
        packed, row = pack_with(source / "t.parquet", tmp_path / "out"), "t.parquet:2"
    else:
        datasets.Dataset(table).save_to_disk(str(source))
        packed, row = pack_with(source, tmp_path / "out"), "train[1]"
    ((refused, reason),) = refused_of(packed).items()
    assert refused == row and "too large" in reason and len(rows_of(tmp_path / "out")) == 2


def test_a_long_cell_is_no_quotation_mark(tmp_path: Path) -> None:
    """Python's csv has a limit of 131,072 characters, which is said of the row alone."""
    for name in "abc":
        put(tmp_path, f"{name}.png", GOOD)
    lines = ["file,caption", "a.png,fine", f"b.png,{'x' * 131_073}", "c.png,fine"]
    table = put(tmp_path, "t.csv", "\n".join(lines).encode())
    packed = pack_with(table, tmp_path / "out")
    said = "expected cells of at most 131072 characters, got 131073"
    assert refused_of(packed) == {"t.csv:3": said}
    assert len(rows_of(tmp_path / "out")) == 2


def test_labels_of_a_hugging_face_data_set_that_are_lists_are_refused(tmp_path: Path) -> None:
    for row in range(2):
        put(tmp_path / "source", f"{row}.png", GOOD)
    columns = {"file": ["0.png", "1.png"], "label": [["a"], None]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "source"))
    found = refused_of(pack_with(tmp_path / "source", tmp_path / "out"))
    assert found == {"train[0]": "label: expected text or a number"}
    assert len(rows_of(tmp_path / "out")) == 1


def write_tar(file: Path, members: list[tuple[str, bytes]], **changes: Any) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def test_members_of_tars_are_refused_by_name(tmp_path: Path) -> None:
    members = [
        ("0.png", GOOD),
        ("1.png", GOOD),
        ("1.txt", b"K\xf6ln"),
        ("2.json", b"{}"),
        ("3.png", GOOD),
        ("3.json", b"{no json"),
        ("4.png", GOOD),
        ("4.png", GOOD),
        ("5.png", GOOD),
        ("5.jpg", GOOD),
        ("6.png", GOOD),
        ("6.json", json.dumps({"caption": {"a": 1}}).encode()),
        ("7.png", GOOD),
        ("7.json", json.dumps({"caption": "\ud800"}).encode()),
        ("0.png", GOOD),
        ("8.png", GOOD),
        ("8.cls", b"99999999999"),
        ("9.png", GOOD),
        ("9.txt", b" " * (1 << 20) + b"long"),
        ("README", b""),
    ]
    tar = write_tar(tmp_path / "t.tar", members)
    found = refused_of(pack_with(tar, tmp_path / "out"))
    assert {name: reason.split(":")[0].split(",")[0] for name, reason in found.items()} == {
        "t.tar:1": "caption",
        "t.tar:2": "expected one picture",
        "t.tar:3": "json",
        "t.tar:4": "png twice",
        "t.tar:5": "expected one picture",
        "t.tar:6": "caption",
        "t.tar:7": "caption",
        "t.tar:0": "a name twice in one tar",
        "t.tar:8": "label",
        "t.tar:9": "expected at most 1048576 bytes of text",
        "t.tar:README": "expected a name with an extension",
    }
    assert len(rows_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("damage", ["cut", "cut between", "header", "zeros"])
def test_the_rest_of_a_damaged_tar_is_refused(tmp_path: Path, damage: str) -> None:
    """Python's reader takes a header that is none for the end of the tar."""
    tar = write_tar(tmp_path / "t.tar", [(f"{i}.png", GOOD) for i in range(4)])
    raw = bytearray(tar.read_bytes())
    step = 512 + -(-len(GOOD) // 512) * 512
    if damage == "cut":
        raw = raw[: 2 * step + 700]
    elif damage == "cut between":
        raw = raw[: 2 * step]
    elif damage == "header":
        raw[2 * step + 10] ^= 255
    tar.write_bytes(raw)
    packed = pack_with(tar, tmp_path / "out")
    if damage == "zeros":
        assert not packed.refused and len(rows_of(tmp_path / "out")) == 4
        return
    ((name, reason), (last, of_last)) = refused_of(packed).items()
    assert name == "t.tar" and reason.startswith("damaged after 1.png")
    assert last == "t.tar:1" and of_last == f"may lack files: its tar is {reason}"
    assert len(rows_of(tmp_path / "out")) == 1


def test_links_in_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.size = len(GOOD)
        tar.addfile(member, io.BytesIO(GOOD))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "a.png")):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, target
            tar.addfile(link)
    found = refused_of(pack_with(tmp_path / "t.tar", tmp_path / "out"))
    assert found == dict.fromkeys(("t.tar:link2.png", "t.tar:link1.png"), "a link or a device")


def bomb(kind: str, folder: Path) -> Path:
    """A small file with a good picture that unpacks to three or four MiB."""
    zeros = bytes(1 << 20)
    if kind == "dictionary":  # one picture of 1 MiB, named by four rows
        large = GOOD + zeros
        table = pyarrow.table({"image": pyarrow.array([large] * 4).dictionary_encode()})
        parquet.write_table(table, folder / "t.parquet", compression="zstd")
        return folder / "t.parquet"
    if kind == "zstd":
        table = pyarrow.table({"image": [GOOD, *(bytes([i]) + zeros for i in range(3))]})
        parquet.write_table(table, folder / "t.parquet", compression="zstd", use_dictionary=False)
        return folder / "t.parquet"
    compression = kind.removesuffix(" behind its end")
    with tarfile.open(folder / "t.tar", "w") as tar:
        for i, content in enumerate([GOOD] + ([zeros] * 3 if kind == compression else [])):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    content = (folder / "t.tar").read_bytes() + (b"" if kind == compression else 3 * zeros)
    opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[compression]
    with opened(folder / f"t.tar.{compression}", "wb") as file:
        file.write(content)
    return folder / f"t.tar.{compression}"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "gz behind its end", "zstd", "dictionary"])
def test_a_file_that_unpacks_to_too_much_ends_the_pack_unless_a_flag_allows_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "MOST_UNPACKED", 2 << 20)
    monkeypatch.setattr(durable_files, "MOST_RATIO", 10)
    file = bomb(kind, tmp_path)
    assert file.stat().st_size < 100_000
    with pytest.raises(durable_files.UnpacksToTooMuch) as caught:
        pack_with(file, tmp_path / "out")
    assert str(caught.value).startswith(f"{file}: unpacks to 0.00 GiB or more")
    assert "type a larger --max-unpacked-gib" in str(caught.value)
    assert not (tmp_path / "out").exists()
    packed = pack_with(file, tmp_path / "out", max_unpacked_gib=0.01)
    assert len(rows_of(tmp_path / "out")) + len(packed.refused) == (1 if "behind" in kind else 4)


def test_long_captions_are_cut_and_counted_or_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png", GOOD)
    put(tmp_path, "b.png", GOOD)
    words = "one two three four five six seven eight nine ten eleven twelve"
    table = put(tmp_path, "t.csv", f"file,caption\na.png,{words}\nb.png,rain\n".encode())
    packed = pack_with(table, tmp_path / "out")
    cut = rows_of(tmp_path / "out")[0].captions[0]
    assert packed.num_cut == packed.manifest.settings["captions_cut"] == 1
    assert cut and words.startswith(cut) and len(cut) < len(words)
    packed = pack_with(table, tmp_path / "refused", long_captions="refuse")
    assert "caption: expected at most 16 token ids, got" in refused_of(packed)["a.png"]
    assert len(rows_of(tmp_path / "refused")) == 1


def test_a_group_in_two_splits_is_refused(tmp_path: Path) -> None:
    lines = ["file,group,split"]
    for i, (group, split) in enumerate([("g", "train"), ("g", "val"), ("", "val"), ("h", "../x")]):
        put(tmp_path, f"{i}.png")
        lines.append(f"{i}.png,{group},{split}")
    packed = pack_with(put(tmp_path, "t.csv", "\n".join(lines).encode()), tmp_path / "out")
    found = refused_of(packed)
    assert found["1.png"] == "of group 'g' in split heldout, which has pictures in split train"
    assert found["3.png"] == "split: expected letters, digits and _, got '../x'"


def test_too_large_pictures_are_refused_unless_they_are_meant(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "source", f"{i}.png", picture(i, height=20, width=30 + i))
    packed = pack_with(tmp_path / "source", tmp_path / "out", max_pixels=620)
    assert list(refused_of(packed)) == ["2.png"]
    assert not pack_with(tmp_path / "source", tmp_path / "all", max_pixels=640).refused


def test_a_source_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="SOURCE: expected a file or folder, got none"):
        pack_with(tmp_path / "none", tmp_path / "out")
    put(tmp_path / "texts", "a.txt", b"")
    with pytest.raises(ValueError, match="expected pictures, tars or Parquet files below"):
        pack_with(tmp_path / "texts", tmp_path / "out")
    with pytest.raises(ValueError, match=r"expected a folder, a table .* or a tar, got"):
        pack_with(put(tmp_path, "a.zip", b""), tmp_path / "out")
    with pytest.raises(ValueError, match="not a Parquet file"):
        pack_with(put(tmp_path, "a.parquet", b"PAR1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
