"""Each kind of source beside the library that reads it elsewhere."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
import torchvision
import webdataset
from PIL import Image
from pyarrow import parquet

from tests.pipelines.packing.helpers import (
    labels_of,
    pack_with,
    picture,
    put,
    refused_of,
    rows_of,
    sizes,
)
from tests.shared.pipelines.data import smooth_picture

CAPTIONS = ["a red cat", "", "two dogs on a beach", "rain"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


# ---- Folders -------------------------------------------------------------------------------------


def test_classes_and_labels_are_those_of_torchvisions_image_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dog", "cat", "Zebra", "an ox"):
        for i in range(3):
            put(tmp_path / "source", f"{name}/{i}.png")
    out = tmp_path / "out"
    pack_with(tmp_path / "source", out, samples_per_shard=5)
    assert "source: imagefolder: every picture is in one of 4 folders" in said(capsys)
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "source"))
    rows = rows_of(out)
    assert labels_of(out) == [theirs.classes[label] for label in theirs.targets]
    assert [row.label for row in rows] == theirs.targets
    for row, (image, _) in zip(rows, theirs, strict=True):
        assert np.array_equal(row.pixels, np.asarray(image))


def test_folders_of_splits_are_splits(tmp_path: Path) -> None:
    for split, number in (("train", 4), ("val", 2)):
        for i in range(number):
            put(tmp_path / "source", f"{split}/{'ab'[i % 2]}/{i}.jpg", picture(i, "JPEG"))
    out = tmp_path / "out"
    assert sizes(pack_with(tmp_path / "source", out).manifest) == {"train": 4, "heldout": 2}
    assert labels_of(out, "heldout") == ["a", "b"]
    for split in ("train", "heldout"):
        theirs = torchvision.datasets.ImageFolder(
            str(tmp_path / "source" / {"heldout": "val"}.get(split, split))
        )
        assert [row.label for row in rows_of(out, split)] == theirs.targets


def test_a_plain_folder_has_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.png", "deep/c.PNG", "deep/er/b.png"]  # folder by folder
    for name in (*names, "notes.txt", "deep/readme"):
        put(tmp_path / "source", name)
    pack_with(tmp_path / "source", tmp_path / "out")
    text = said(capsys)
    assert "source: folder" in text and "2 files are not called like pictures" in text
    assert labels_of(tmp_path / "out") == [None] * 3
    found = [row.image for row in rows_of(tmp_path / "out")]
    assert found == [(tmp_path / "source" / name).read_bytes() for name in names]


# ---- Tables --------------------------------------------------------------------------------------


def write_csv(file: Path, header: list[str], rows: list[list[Any]], **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        csv.writer(out, **options).writerows([header, *rows])
    return file


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_a_csv_is_read_as_python_reads_it(
    tmp_path: Path, delimiter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["one, two; three | four", 'she said "rain"', "", "two\nlines"]
    rows = [[f"p/{i}.png", captions[i], ["cat", "", "dog", "cat"][i]] for i in range(4)]
    for row in rows:
        put(tmp_path, row[0])
    file = write_csv(tmp_path / "t.csv", ["file", "caption", "class"], rows, delimiter=delimiter)
    if delimiter == "\t":  # in which quotation marks mean nothing
        rows = [[f"p/{i}.png", f'a 5" tape {i}', ""] for i in range(4)]
        file.write_text("\n".join("\t".join(row) for row in [["file", "caption", "class"], *rows]))
    pack_with(file, tmp_path / "out")
    assert "captions caption (--caption-column), label class (--label-column)" in said(capsys)
    if delimiter == "\t":
        assert [row.captions for row in rows_of(tmp_path / "out")] == [
            (f'a 5 " tape {i}',) for i in range(4)
        ]
        return
    assert labels_of(tmp_path / "out") == ["cat", None, "dog", "cat"]
    found = ["".join(" ".join(row.captions).split()) for row in rows_of(tmp_path / "out")]
    assert found == ["".join(c.split()) for c in captions]


@pytest.mark.parametrize("kind", ["csv", "parquet", "huggingface"])
def test_numbers_that_are_called_like_captions_are_none(tmp_path: Path, kind: str) -> None:
    columns: dict[str, list[Any]] = {
        "file": ["0.png", "1.png", "2.png"],
        "caption_id": [8, 9, None],
        "caption_length": [5.5, None, 3.0],
        "caption_en": ["a dog", "7", "a cat"],
        "caption_2": ["1", "2", "3"],
    }
    for name in columns["file"]:
        put(tmp_path / "hf" if kind == "huggingface" else tmp_path, name)
    source = tmp_path / {"huggingface": "hf"}.get(kind, f"t.{kind}")
    if kind == "csv":
        lines = [
            ["" if c is None else c for c in row] for row in zip(*columns.values(), strict=True)
        ]
        write_csv(source, list(columns), lines)
    elif kind == "parquet":
        parquet.write_table(pyarrow.table(columns), source)
    else:
        datasets.Dataset.from_dict(columns).save_to_disk(source)
    packed = pack_with(source, tmp_path / "out")
    assert not packed.refused
    captions = [row.captions for row in rows_of(tmp_path / "out")]
    assert captions == [("a dog", "1"), ("7", "2"), ("a cat", "3")]
    if kind == "csv":  # a flag takes them
        pack_with(source, tmp_path / "asked", caption_column=("caption_id",))
        captions = [row.captions for row in rows_of(tmp_path / "asked")]
        assert captions == [("8",), ("9",), ()]


def test_columns_are_chosen_by_flags(tmp_path: Path) -> None:
    rows = [["x", f"{i}.png", "one", "two", i % 2, f"g{i // 2}"] for i in range(4)]
    for row in rows:
        put(tmp_path / "pictures", row[1])
    header = ["file", "where", "a", "b", "number", "same"]
    file = write_csv(tmp_path / "t.csv", header, rows)
    packed = pack_with(
        file,
        tmp_path / "out",
        image_column="where",
        caption_column=("a", "b"),
        label_column="number",
        group_column="same",
        image_root=tmp_path / "pictures",
    )
    found = rows_of(tmp_path / "out")
    assert [row.captions for row in found] == [("one", "two")] * 4
    assert [row.label for row in found] == [0, 1, 0, 1]
    assert [row.group_id for row in found] == [0, 0, 2, 2]
    assert packed.manifest.splits["train"].num_groups == 2
    with pytest.raises(ValueError, match="--caption-column: expected one of file, where, .* got c"):
        pack_with(file, tmp_path / "other", image_column="where", caption_column=("c",))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "bytes", "huggingface"])
@pytest.mark.parametrize("name", ["Image Path", "Plate"])
def test_the_column_of_pictures_is_found_by_its_name_with_spaces_or_by_its_cells(
    kind: str, name: str, tmp_path: Path
) -> None:
    """Also where another column stands before it; of Parquet by types, so by bytes alone."""
    source = tmp_path / "source"
    paths = [put(source, f"{i}.png").name for i in range(3)]
    cells: list[Any] = paths if kind in ("csv", "jsonl", "parquet") else [picture(9)] * 3
    columns = {"id": ["7", "8", "9"], "caption": ["a", "b.", "c"], name: cells}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if kind == "csv":
        source = write_csv(source / "t.csv", [*columns], [[*row.values()] for row in rows])
    elif kind == "jsonl":
        source = put(source, "t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    elif kind == "huggingface":
        datasets.Dataset.from_dict(columns).save_to_disk(str(source))
    else:
        parquet.write_table(pyarrow.table(columns), source / "t.parquet")
        source = source / "t.parquet"
    if kind == "parquet" and name == "Plate":
        with pytest.raises(ValueError, match="name it by --image-column"):
            pack_with(source, tmp_path / "out")
        return
    packed = pack_with(source, tmp_path / "out")
    assert not packed.refused and len(rows_of(tmp_path / "out")) == 3


def test_rows_of_one_picture_are_refused_or_merged(tmp_path: Path) -> None:
    rows = [["0.png", "one"], ["1.png", "other"], ["0.png", "two"], ["./0.png", "three"]]
    put(tmp_path, "0.png")
    put(tmp_path, "1.png")
    file = write_csv(tmp_path / "t.csv", ["file", "caption"], rows)
    packed = pack_with(file, tmp_path / "out")
    assert list(refused_of(packed)) == ["t.csv:4", "t.csv:5"]
    assert "0.png: named by an earlier row" in refused_of(packed)["t.csv:4"]
    pack_with(file, tmp_path / "merged", merge_rows=True)
    assert rows_of(tmp_path / "merged")[0].captions == ("one", "two", "three")


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_holds_what_pyarrow_reads(tmp_path: Path, kind: str) -> None:
    pictures = [picture(i, ("PNG", "JPEG")[i % 2]) for i in range(7)]
    for i, content in enumerate(pictures):
        put(tmp_path / "source", f"{i}.img", content)
    images: list[Any] = {
        "bytes": pictures,
        "struct": [{"bytes": content, "path": None} for content in pictures],
        "path": [f"{i}.img" for i in range(7)],
    }[kind]
    captions = [[f"number {i}", f"the {i}"][: i % 3] for i in range(7)]
    columns = {"image": images, "captions": captions, "label": [0, None, 2, 1, 0, 1, 1]}
    file = tmp_path / "source" / "t.parquet"
    parquet.write_table(pyarrow.table(columns), file, row_group_size=3)
    pack_with(file, tmp_path / "out", samples_per_shard=2)
    theirs = parquet.read_table(file).to_pylist()
    rows = rows_of(tmp_path / "out")
    assert [row.image for row in rows] == pictures
    assert [list(row.captions) for row in rows] == [row["captions"] for row in theirs]
    assert [row.label for row in rows] == [-1 if r["label"] is None else r["label"] for r in theirs]


def test_parquet_files_of_a_folder_are_one_source(tmp_path: Path) -> None:
    """Two of the same name in two folders, and a split by name as in the hub's layout."""
    pictures = {}
    for i, name in enumerate(["a/train-0.parquet", "b/train-0.parquet", "b/test-0.parquet"]):
        pictures[name] = [picture(10 * i + j) for j in range(3)]
        file = put(tmp_path / "source", name, b"")
        parquet.write_table(pyarrow.table({"image": pictures[name]}), file)
    packed = pack_with(tmp_path / "source", tmp_path / "out")
    assert not packed.refused and sizes(packed.manifest) == {"train": 6, "test": 3}
    found = [row.image for row in rows_of(tmp_path / "out")]
    assert found == pictures["a/train-0.parquet"] + pictures["b/train-0.parquet"]


# ---- Tars ----------------------------------------------------------------------------------------


def write_tar(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def web_members(number: int, tar: int = 0) -> list[tuple[str, bytes]]:
    """As img2dataset writes them: jpg, txt and json of a key."""
    members = []
    for i in range(number):
        key = f"{tar:05d}{i:04d}"
        facts = {"caption": f"caption {i}", "key": key, "alt": [f"alt {i}", None], "class": i % 3}
        members += [
            (f"{key}.jpg", picture(i, "JPEG")),
            (f"{key}.txt", f"text {i}".encode()),
            (f"{key}.json", json.dumps(facts).encode()),
        ]
    return members


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_tars_hold_what_webdataset_reads(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "source"
    mode = "w:gz" if suffix == "tar.gz" else "w"
    tars = [write_tar(source / f"{i:05d}.{suffix}", web_members(3 + i, i), mode) for i in range(2)]
    pack_with(source, tmp_path / "out")
    theirs = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    rows = rows_of(tmp_path / "out")
    assert [row.image for row in rows] == [row["jpg"] for row in theirs]
    assert [row.captions for row in rows] == [(row["txt"].decode(),) for row in theirs]
    pack_with(
        source, tmp_path / "json", json_caption=("caption", "alt"), label_column="class", limit=5
    )
    rows = rows_of(tmp_path / "json")
    assert len(rows) == 5
    for row in rows:
        facts = json.loads(theirs[row.sample_id]["json"])
        assert row.captions == (facts["caption"], facts["alt"][0])
        assert row.label == facts["class"]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_picture_of_a_tar_is_chosen_by_its_whole_extension(tmp_path: Path, suffix: str) -> None:
    members = [("1.left.png", picture(1)), ("1.right.png", picture(2)), ("1.txt", b"a pair")]
    mode = "w:gz" if suffix == "tar.gz" else "w"
    tar = write_tar(tmp_path / f"t.{suffix}", members, mode)
    packed = pack_with(tar, tmp_path / "out", image_column="left.png")
    assert not packed.refused
    (row,) = rows_of(tmp_path / "out")
    assert (row.image, row.captions) == (picture(1), ("a pair",))


@pytest.mark.parametrize("source", ["val.tar", "."])
def test_a_single_tar_is_of_the_split_in_its_name(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = write_tar(tmp_path / "source" / "val.tar", web_members(3))
    packed = pack_with(tar.parent / source, tmp_path / "out")
    assert sizes(packed.manifest) == {"heldout": 3}
    assert "splits are in the names of tars: 1 of heldout (--split)" in capsys.readouterr().err
    packed = pack_with(tar, tmp_path / "named", split=("train",))
    assert sizes(packed.manifest) == {"train": 3}


def test_own_shards_are_a_source_too(tmp_path: Path) -> None:
    for i in range(6):
        put(tmp_path / "source", f"{'ab'[i % 2]}/{i}.png")
    first = tmp_path / "first"
    pack_with(tmp_path / "source", first)
    (first / "classes.txt").write_text("a\nb\n")
    pack_with(first / "train-000000.tar", tmp_path / "second", class_names=first / "classes.txt")
    assert sorted(row.pixels.tobytes() for row in rows_of(tmp_path / "second")) == sorted(
        row.pixels.tobytes() for row in rows_of(first)
    )
    assert sorted(map(str, labels_of(tmp_path / "second"))) == sorted(map(str, labels_of(first)))


# ---- Libraries' data sets on disk ----------------------------------------------------------------


@pytest.mark.parametrize("has_splits", [True, False])
def test_a_hugging_face_data_set_is_read_as_its_library_reads_it(
    tmp_path: Path, has_splits: bool
) -> None:
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["dog", "cat"]),
    )

    def made(start: int, number: int) -> Any:
        columns = {
            "image": [Image.fromarray(smooth_picture(start + i, 20, 30)) for i in range(number)],
            "text": [CAPTIONS[i % 4] for i in range(number)],
            "label": [(-1, 0, 1)[i % 3] for i in range(number)],
        }
        return datasets.Dataset.from_dict(columns, features=features)

    saved = made(0, 6)
    if has_splits:
        saved = datasets.DatasetDict(train=saved, validation=made(6, 3))
    saved.save_to_disk(str(tmp_path / "source"))
    pack_with(tmp_path / "source", tmp_path / "out")
    loaded = datasets.load_from_disk(str(tmp_path / "source"))
    theirs = loaded["train"] if has_splits else loaded
    for row, other in zip(rows_of(tmp_path / "out"), theirs, strict=True):
        assert np.array_equal(row.pixels, np.asarray(other["image"].convert("RGB")))
        assert " ".join(row.captions) == other["text"]
    names = ["dog", "cat"]
    assert labels_of(tmp_path / "out") == [
        None if label < 0 else names[label] for label in theirs["label"]
    ]
    if has_splits:
        assert len(rows_of(tmp_path / "out", "heldout")) == 3


def test_cifar_is_read_as_torchvision_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of CIFAR-10's layout, of random pictures, whose MD5 is therefore another."""
    folder = tmp_path / "source" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    kind = torchvision.datasets.CIFAR10
    names = [name for name, _ in kind.train_list + kind.test_list]
    for name in names:
        data = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, 2).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}))
    meta = {"label_names": list("abcdefghij")}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="CIFAR10 finds no data"):
        pack_with(tmp_path / "source", tmp_path / "refused")
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    packed = pack_with(tmp_path / "source", tmp_path / "out")
    assert sizes(packed.manifest) == {"train": 10, "test": 2}
    assert packed.manifest.class_names == tuple("abcdefghij")
    for split, train in (("train", True), ("test", False)):
        theirs = kind(str(tmp_path / "source"), train=train)
        for row, (image, label) in zip(rows_of(tmp_path / "out", split), theirs, strict=True):
            assert row.label == label
            assert np.array_equal(row.pixels, np.asarray(image))


def test_lines_of_json_are_a_table(tmp_path: Path) -> None:
    """As metadata.jsonl of the datasets library."""
    rows: list[dict[str, Any]] = [
        {"file_name": f"{i}.png", "text": caption, "label": "ab"[i % 2]}
        for i, caption in enumerate(CAPTIONS)
    ]
    del rows[2]["label"]
    for row in rows:
        put(tmp_path / "source", row["file_name"])
    table = tmp_path / "source" / "metadata.jsonl"
    table.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode() + b"\n\n[1]\n{\n")
    packed = pack_with(table, tmp_path / "out")
    assert [row.captions for row in rows_of(tmp_path / "out")] == [
        (text,) if text else () for text in CAPTIONS
    ]
    assert labels_of(tmp_path / "out") == ["a", "b", None, "b"]
    found = refused_of(packed)
    assert found["metadata.jsonl:6"] == "json: expected an object, got list"
    assert found["metadata.jsonl:7"].startswith("json: Expecting property name")
    with pytest.raises(ValueError, match="--column NAME:regions=FILE for COCO's boxes, or write"):
        pack_with(put(tmp_path, "coco.json", b"{}"), tmp_path / "none")


def test_classes_of_the_datasets_library_keep_their_names_in_parquet(tmp_path: Path) -> None:
    names = ["tench", "gold fish", "shark"]
    rows = {"image": [picture(i) for i in range(4)], "label": [2, 0, 2, -1]}
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=names)}
    )
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "t.parquet"))
    pack_with(tmp_path / "t.parquet", tmp_path / "out")
    assert labels_of(tmp_path / "out") == ["shark", "tench", "shark", None]


def test_labels_that_are_lists_and_pictures_that_are_urls_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    rows = [("0.png", "a"), ("1.png", ["a", "b"]), ("https://a.b/c.jpg", "a")]
    lines = [json.dumps({"image": image, "label": label}) for image, label in rows]
    put(tmp_path, "1.png")
    packed = pack_with(put(tmp_path, "t.jsonl", "\n".join(lines).encode()), tmp_path / "out")
    assert [(refusal.file, refusal.what_to_do) for refusal in packed.refused] == [
        ("t.jsonl:2", "name another --label-column; a set of labels is read by --column "
                      "NAME:labels=COLUMN"),
        ("t.jsonl:3", "pictures are not fetched: download them, by img2dataset for example"),
    ]  # fmt: skip


def test_splits_of_a_column_are_called_as_others_call_them(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path, f"{i}.png")
    rows = [[f"{i}.png", split] for i, split in enumerate(["TRAIN", "Validation ", "night"])]
    packed = pack_with(write_csv(tmp_path / "t.csv", ["file", "split"], rows), tmp_path / "out")
    assert sizes(packed.manifest) == {"train": 1, "heldout": 1, "night": 1}


def test_numbers_that_are_too_large_for_indices_are_told_to_be_names(tmp_path: Path) -> None:
    for i in range(2):
        put(tmp_path, f"{i}.png")
    rows = [["0.png", "7"], ["1.png", "3000000"]]
    table = write_csv(tmp_path / "t.csv", ["file", "label"], rows)
    packed = pack_with(table, tmp_path / "out")
    assert (
        "where numbers are names, as of taxa, say --label-as name" in packed.refused[0].what_to_do
    )
    pack_with(table, tmp_path / "names", label_as="name")
    assert labels_of(tmp_path / "names") == ["7", "3000000"]
