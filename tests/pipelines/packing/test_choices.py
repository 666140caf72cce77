"""What a pack makes of a whole source: its kind, its splits, its place, and its tasks."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torchvision
from PIL import Image
from pyarrow import parquet

from m3i_fast.pipelines.packing import workers
from m3i_fast.pipelines.packing.items import SourceOptions
from m3i_fast.pipelines.packing.readers.torchvision_sets import TorchvisionSets
from m3i_fast.pipelines.packing.shard_task import Record, ShardTask
from m3i_fast.pipelines.packing.workers import run_here, with_ray
from tests.pipelines.packing.helpers import (
    labels_of,
    pack_with,
    picture,
    put,
    refused_of,
    rows_of,
    sizes,
)


def test_classes_are_found_behind_a_first_one_of_many_pictures(tmp_path: Path) -> None:
    for i in range(1001):
        put(tmp_path / "source", f"a/{i:04d}.png", b"none")
    put(tmp_path / "source", "a/last.png")
    put(tmp_path / "source", "b/0.png")
    pack_with(tmp_path / "source", tmp_path / "out", samples_per_shard=2000)
    assert labels_of(tmp_path / "out") == ["a", "b"]


def test_a_split_of_refused_pictures_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "source", "train/a/0.png")
    put(tmp_path / "source", "val/a/0.png", b"none")
    packed = pack_with(tmp_path / "source", tmp_path / "out")
    assert sizes(packed.manifest) == {"train": 1} and list(refused_of(packed)) == ["val/a/0.png"]
    assert "split heldout is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "group", "share", "said"),
    [
        (4, "", 0.1, "takes none of 4 pictures in 4 groups of split train; type .*=0.25 or more"),
        (40, "g", 0.1, "takes all of 40 pictures in 1 groups .* --group-column ''"),
    ],
)
def test_a_share_that_takes_none_or_all_is_refused(
    tmp_path: Path, number: int, group: str, share: float, said: str
) -> None:
    lines = ["file,group", *(f"{i}.png,{group}" for i in range(number))]
    for i in range(number):
        put(tmp_path / "source", f"{i}.png")
    table = put(tmp_path / "source", "t.csv", "\n".join(lines).encode())
    with pytest.raises(ValueError, match=f"--split heldout=0.1: {said}"):
        pack_with(table, tmp_path / "out", split=(f"heldout={share}",))
    typed: dict[str, Any] = {"group_column": ""} if group else {}
    packed = pack_with(table, tmp_path / "out", split=("heldout=0.25",), **typed)
    assert sizes(packed.manifest) == {"train": number * 3 // 4, "heldout": number // 4}


def test_nan_is_a_missing_group_caption_and_label(tmp_path: Path) -> None:
    columns = {
        "image": [picture(i) for i in range(4)],
        "group": [math.nan, math.nan, 7.0, 7.0],
        "caption": pyarrow.array([math.nan] * 4),
        "label": [math.nan, 1.0, 0.0, math.nan],
    }
    put(tmp_path, "t.parquet", b"")
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    packed = pack_with(tmp_path / "t.parquet", tmp_path / "out")
    assert not packed.refused
    rows = rows_of(tmp_path / "out")
    assert [row.group_id for row in rows] == [0, 1, 2, 2]
    assert [row.captions for row in rows] == [()] * 4
    assert [row.label for row in rows] == [-1, 1, 0, -1]


@pytest.mark.parametrize(
    ("written", "label_as", "names", "expected"),
    [
        (["0.0", "", "10.0", "2.0", "-1.0"], "auto", "0 1 2 3 4 5 6 7 8 9 10", [0, -1, 10, 2, -1]),
        (["0.0", "", "2.0"], "index", "0 1 2", [0, -1, 2]),
        (["1.0", "", "0.0"], "name", "0.0 1.0", [1, -1, 0]),
        (["0.0", "2.5", "1.0"], "auto", "0.0 1.0 2.5", [0, 2, 1]),
        (["0.0", "1", ""], "auto", "0.0 1", [0, 1, -1]),
    ],
)
def test_labels_of_a_csv_with_gaps_are_whole_numbers(
    tmp_path: Path, written: list[str], label_as: str, names: str, expected: list[int]
) -> None:
    """As pandas writes a column of integers some of which are missing."""
    for i in range(len(written)):
        put(tmp_path, f"{i}.png")
    lines = ["file,label", *(f"{i}.png,{label}" for i, label in enumerate(written))]
    table = put(tmp_path, "t.csv", "\n".join(lines).encode())
    packed = pack_with(table, tmp_path / "out", label_as=label_as)
    assert not packed.refused and packed.manifest.class_names == tuple(names.split())
    assert [row.label for row in rows_of(tmp_path / "out")] == expected


@pytest.mark.parametrize("kind", ["name", "float"])
def test_labels_with_a_point_are_told_by_the_classes_that_are_known(
    tmp_path: Path, kind: str
) -> None:
    put(tmp_path, "0.png")
    put(tmp_path, "1.png")
    table = put(tmp_path, "t.csv", b"file,label\n0.png,2.0\n1.png,1.0\n")
    names = {"name": "1.0\n2.0\n", "float": "a\nb\nc\n"}[kind]
    classes = put(tmp_path, "names.txt", names.encode())
    pack_with(table, tmp_path / "out", class_names=classes)
    assert labels_of(tmp_path / "out") == {"name": ["2.0", "1.0"], "float": ["c", "b"]}[kind]


@pytest.mark.parametrize("place", ["packed", "."])
def test_a_directory_in_the_source_is_refused(tmp_path: Path, place: str) -> None:
    put(tmp_path / "source", "a.png")
    out = tmp_path / "source" / place
    with pytest.raises(ValueError, match="DIR: expected a directory outside of SOURCE"):
        pack_with(tmp_path / "source", out)
    assert os.listdir(tmp_path / "source") == ["a.png"]


def test_a_copy_of_pictures_is_kept_while_its_source_stays(tmp_path: Path) -> None:
    """A pack that ends after listing goes on with the copy; a finished one makes none."""
    file, out = tmp_path / "t.parquet", tmp_path / "out"
    parquet.write_table(pyarrow.table({"image": [picture(i) for i in range(6)]}), file)

    def stopped(tasks: Sequence[ShardTask], advance: Any) -> Iterator[tuple[ShardTask, Record]]:
        for task in tasks[:1]:
            yield next(iter(run_here([task], advance)))
        raise KeyboardInterrupt

    made = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pack_with(file, out, stopped, samples_per_shard=2)
        made.append((out / ".packing/spool").stat().st_ino)
    assert made[0] == made[1]
    pack_with(file, out, samples_per_shard=2)
    assert [row.image for row in rows_of(out)] == [picture(i) for i in range(6)]
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert pack_with(file, out, samples_per_shard=2).was_there
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before

    with pytest.raises(KeyboardInterrupt):
        pack_with(file, tmp_path / "changed", stopped)
    inode = (tmp_path / "changed/.packing/spool").stat().st_ino
    os.utime(file, (1, 1))
    with pytest.raises(ValueError, match=r"another source or other settings.*t\.parquet"):
        pack_with(file, tmp_path / "changed", stopped)
    assert (tmp_path / "changed/.packing/spool").stat().st_ino != inode


class Set:
    """A data set of a picture, told by the arguments that it was made with."""

    takes: tuple[str, ...] = ()

    def __init__(self, root: str, split: str) -> None:
        if split not in self.takes:
            raise ValueError(f"no split {split}")
        self.labels = [-1 if split == "unlabeled" else 0]
        self.classes = ["one"]

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("name", "takes", "expected"),
    [
        ("STL10", ("train", "test", "unlabeled", "train+unlabeled"), "train test unlabeled"),
        ("OxfordIIITPet", ("trainval", "test"), "train test"),
        ("FGVCAircraft", ("train", "val", "trainval", "test"), "train heldout test"),
    ],
)
def test_each_picture_of_torchvisions_splits_is_taken_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    takes: tuple[str, ...],
    expected: str,
) -> None:
    """The splits that the classes of torchvision take, without their gigabytes."""
    made = type(name, (Set,), {"takes": takes})
    if name == "STL10":
        assert set(takes) == set(torchvision.datasets.STL10.splits)
    monkeypatch.setattr(torchvision.datasets, name, made)
    options = SourceOptions(path=tmp_path, kind="torchvision", torchvision_class=name)
    listing = TorchvisionSets(options).list()
    assert [item.split for item in listing.items] == expected.split()


def idx(numbers: Any, code: int, kind: str) -> bytes:
    """Return an array in the format of MNIST's files."""
    shape = b"".join(n.to_bytes(4, "big") for n in numbers.shape)
    return bytes([0, 0, code, numbers.ndim]) + shape + bytes(numbers.astype(kind).tobytes())


@pytest.mark.parametrize("name", ["EMNIST", "QMNIST"])
def test_relatives_of_mnist_are_read_as_torchvision_reads_them(tmp_path: Path, name: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28))
    for split in ("train", "test"):
        stem = f"{name}/raw/{'emnist-byclass' if name == 'EMNIST' else 'qmnist'}-{split}"
        put(tmp_path, f"{stem}-images-idx3-ubyte", idx(pixels, 8, ">u1"))
        put(tmp_path, f"{stem}-labels-idx1-ubyte", idx(np.array([1, 2, 61]), 8, ">u1"))
        rows = np.arange(24).reshape(3, 8) % 10
        put(tmp_path, f"{stem}-labels-idx2-int", idx(rows, 12, ">i4"))
    options = SourceOptions(path=tmp_path, kind="torchvision", torchvision_class=name)
    reader = TorchvisionSets(options)
    listing = reader.list()
    assert not listing.refusals
    assert [item.split for item in listing.items] == ["train"] * 3 + ["test"] * 3
    split = {"split": "byclass"} if name == "EMNIST" else {}
    theirs = getattr(torchvision.datasets, name)(str(tmp_path), train=False, **split)
    for item, (image, label) in zip(listing.items[3:], theirs, strict=True):
        found = Image.open(io.BytesIO(reader.read(item.place)))
        assert item.label == label and np.array_equal(found, image)


def test_ray_is_not_started_without_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_ray(*_: Any, **__: Any) -> Any:
        raise AssertionError("started")

    monkeypatch.setattr(workers, "require", no_ray)
    assert list(with_ray("local")([], lambda number: None)) == []


@pytest.mark.matrix
def test_processes_are_given_a_few_tasks_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pool, whose waiting tasks are counted."""
    pending: list[int] = []

    class Counting(workers.ProcessPoolExecutor):
        def submit(self, *args: Any, **more: Any) -> Any:
            future = super().submit(*args, **more)
            pending.append(
                sum(not work.future.done() for work in self._pending_work_items.values())
            )
            return future

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Counting)
    for i in range(24):
        put(tmp_path / "source", f"{i}.png")
    run = workers.with_processes(1)
    pack_with(tmp_path / "source", tmp_path / "out", run, samples_per_shard=2)
    assert len(pending) == 12 and max(pending) <= workers.IN_FLIGHT
    assert len(rows_of(tmp_path / "out")) == 24
