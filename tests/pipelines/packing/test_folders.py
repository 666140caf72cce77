"""Folders as others lay them out: splits, classes and captions beside pictures are told."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.pipelines.packing.items import split_called, split_in_name
from m3i_fast.pipelines.packing.readers import folders
from tests.pipelines.packing.helpers import (
    labels_of,
    pack_with,
    put,
    refused_of,
    rows_of,
    sizes,
)


def made(root: Path, layout: dict[str, int]) -> Path:
    """Make so many pictures in each folder."""
    for folder, number in layout.items():
        for i in range(number):
            put(root, f"{folder}/{i}.png".removeprefix("./"))
    return root


LAYOUTS = {
    "COCO": (
        {"train2017": 3, "val2017": 2, "test2017": 1},
        {"train": 3, "heldout": 2, "test": 1},
        {None: 3},
    ),
    "Roboflow": (
        {"train/images": 3, "valid/images": 2, "test/images": 1},
        {"train": 3, "heldout": 2, "test": 1},
        {None: 3},
    ),
    "YOLO": ({"images/train": 3, "images/val": 2}, {"train": 3, "heldout": 2}, {None: 3}),
    "ImageNet of Kaggle": (
        {"Data/CLS-LOC/train/n01": 2, "Data/CLS-LOC/train/n02": 1, "Data/CLS-LOC/val": 2},
        {"train": 3, "heldout": 2},
        {"n01": 2, "n02": 1},
    ),
    "capitals": (
        {"Train/cat": 2, "Train/dog": 1, "Test/cat": 1},
        {"train": 3, "test": 1},
        {"cat": 2, "dog": 1},
    ),
    "one class": ({"train/cat": 2, "val/cat": 1}, {"train": 2, "heldout": 1}, {"cat": 2}),
    "a picture beside classes": (
        {"cat": 8, "dog": 4, ".": 1},
        {"train": 13},
        {"cat": 8, "dog": 4, None: 1},
    ),
    "a picture beside splits": (
        {"train/cat": 8, "train/dog": 2, "val/cat": 2, "val/dog": 1, "assets": 1},
        {"train": 10, "heldout": 3},
        {"cat": 8, "dog": 2},
    ),
    "a class that is called train": (
        {"train": 2, "plane": 2},
        {"train": 4},
        {"train": 2, "plane": 2},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_others_are_told(name: str, tmp_path: Path) -> None:
    layout, expected, labels = LAYOUTS[name]
    out = tmp_path / "out"
    packed = pack_with(made(tmp_path / "source", layout), out)
    assert sizes(packed.manifest) == expected
    assert Counter(labels_of(out)) == labels
    assert len(packed.refused) == sum(layout.values()) - sum(expected.values())
    if packed.refused:
        assert "expected a folder of its split" in packed.refused[0].reason


def test_captions_beside_pictures_are_read_and_folders_of_shards_are_no_classes(
    tmp_path: Path,
) -> None:
    """As img2dataset writes files."""
    source, out = tmp_path / "source", tmp_path / "out"
    for i in range(4):
        put(source, f"0000{i // 2}/{i}.png")
        put(source, f"0000{i // 2}/{i}.json", b"{}")
        if i != 2:
            put(source, f"0000{i // 2}/{i}.txt", f"red cat {i}\n".encode())
    put(source, "00001/3.txt", b"red\xe9 cat")
    found = pack_with(source, out)
    assert [row.captions for row in rows_of(out)] == [("red cat 0",), ("red cat 1",), ()]
    assert labels_of(out) == [None] * 3 and found.manifest.class_names == ()
    assert refused_of(found) == {"00001/3.png": "caption: not UTF-8 (invalid continuation byte "
                                                "at byte 3)"}  # fmt: skip
    without = pack_with(source, tmp_path / "without", caption_column=("",))
    assert without.manifest.splits["train"].num_captions == 0
    with pytest.raises(ValueError, match="--caption-column: expected txt, or '' for none, .*title"):
        pack_with(source, tmp_path / "wrong", caption_column=("title",))


def test_classes_may_have_captions_and_numbers_are_none(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for i in range(4):
        put(source, f"{'ab'[i % 2]}/{i}.png")
        put(source, f"{'ab'[i % 2]}/{i}.txt", b"a red cat" if i else b"0 0.5 0.5 0.1 0.2")
    pack_with(source, tmp_path / "out")
    assert labels_of(tmp_path / "out") == ["a", "a", "b", "b"]
    assert [len(row.captions) for row in rows_of(tmp_path / "out")] == [1, 1, 1, 1]
    for i in range(4):
        put(source, f"{'ab'[i % 2]}/{i}.txt", b"0 0.5 0.5 0.1 2e-1\n1 0.25 0.5 0.1 0.2\n")
    pack_with(source, tmp_path / "boxes")
    assert labels_of(tmp_path / "boxes") == ["a", "a", "b", "b"]
    assert [row.captions for row in rows_of(tmp_path / "boxes")] == [()] * 4


@pytest.mark.parametrize(("name", "kind"), [("data/0.tar", "tars"), ("x.parquet", "table")])
def test_pictures_beside_tars_or_tables_ask_for_a_kind(
    name: str, kind: str, tmp_path: Path
) -> None:
    source = made(tmp_path / "source", {"assets": 1})
    put(source, name, b"")
    with pytest.raises(ValueError, match=f"got 1 pictures and 1 .*--kind folder .*--kind {kind}"):
        pack_with(source, tmp_path / "out")
    pack_with(source, tmp_path / "out", kind="folder")


def test_an_error_of_the_storage_ends_a_pack_which_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "source", {"pictures": 6})
    read, calls = folders.read_picture, iter(range(100))

    def drops(path: Path, *listed: Any) -> bytes:
        if next(calls) >= 4:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path, *listed)

    for bits in (None, 0):
        out = tmp_path / f"out {bits}"
        calls = iter(range(100))
        monkeypatch.setattr(folders, "read_picture", drops)
        with pytest.raises(OSError, match="Input/output error, which is of the storage"):
            pack_with(source, out, samples_per_shard=2, group_near_duplicates=bits)
        monkeypatch.setattr(folders, "read_picture", read)
        packed = pack_with(source, out, samples_per_shard=2, group_near_duplicates=bits)
        assert sizes(packed.manifest) == {"train": 6} and packed.refused == ()


def test_a_source_that_is_not_mounted_any_more_ends_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path / "source", {"pictures": 2})
    read = folders.read_picture

    def unmounted(path: Path, *listed: Any) -> bytes:
        (source / "pictures").rename(tmp_path / "elsewhere")
        return read(path, *listed)

    monkeypatch.setattr(folders, "read_picture", unmounted)
    with pytest.raises(OSError, match="No such file or directory, which is of the storage"):
        pack_with(source, tmp_path / "out")


def test_what_a_name_says_of_its_split() -> None:
    called = ["Train", "val2017", "test_1", "validation", "trains", "heldout-2", "images"]
    expected = ["train", "heldout", "test", "heldout", None, "heldout", None]
    assert [split_called(name) for name in called] == expected
    names = {
        "train-00000-of-00004.tar": "train",
        "val2017-000.tar": "heldout",
        "train/x_TEST_0.tar": "test",
        "val/000.tar": "heldout",
        "train_val-0.tar": None,
        "cc12m-0001.tar": None,
    }
    assert {name: split_in_name(name) for name in names} == names
