"""Named columns of tables and of Hugging Face's data sets, as their libraries read them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.packing.workers import run_here, with_processes
from tests.pipelines.packing.helpers import (
    TOKENIZER,
    contents,
    pack_with,
    picture,
    put,
    refused_of,
)
from tests.shared.pipelines.data import smooth_picture

ASKED = ("genus:class", "tags:labels", "size:numbers=height,weight", "pose:numbers", "alt:text")


def found_in(out: Path, split: str = "train") -> dict[int, dict[str, Any]]:
    """The values of each sample by its id: names of classes and labels, numbers, decoded text."""
    manifest = read_manifest(out)
    table = SampleTable.open(out, manifest, split)
    rows = {}
    for number, sample in enumerate(np.asarray(table.rows["sample_id"]).tolist()):
        assert table.columns is not None
        raw = table.columns.rows[number]
        values = {c.name: (c, c.value(raw[c.name])) for c in table.columns.columns}
        rows[sample] = {name: _told(*pair) for name, pair in values.items()}
    return rows


def _told(column: Any, value: Any) -> Any:
    if value is None or column.kind == "numbers":
        return value
    if column.kind == "text":
        return TOKENIZER.decode(value)
    return column.names[value] if column.kind == "class" else [column.names[i] for i in value]


def test_a_csv(tmp_path: Path) -> None:
    lines = [
        "file,genus,tags,height,weight,pose,alt,caption",
        "0.png,cat,red;big,1.5,2,1;2;3,a red cat,one",
        "1.png,dog,,-3,,,,two",
        '2.png,,"[""old"", ""big""]",,,4;;6,the dog,three',
        "3.png,owl,[],0,1e3,7;8;9,  ,four",
        "4.png,cat,red,x,1,1;2;3,a,five",
        "5.png,cat,red,1,1,1;2,a,six",
    ]
    for i in range(6):
        put(tmp_path, f"{i}.png")
    put(tmp_path, "t.csv", "\n".join(lines).encode())
    packed = pack_with(tmp_path / "t.csv", tmp_path / "out", column=ASKED)
    assert list(refused_of(packed)) == ["4.png", "5.png"]
    assert "size: expected a number, got 'x'" in refused_of(packed)["4.png"]
    assert "pose: expected 3 numbers, got 2" in refused_of(packed)["5.png"]
    kinds = {c.name: (c.kind, c.names, c.size) for c in packed.manifest.columns}
    assert kinds["genus"] == ("class", ("cat", "dog", "owl"), 1)
    assert kinds["tags"] == ("labels", ("big", "old", "red"), 2)
    assert kinds["size"] == ("numbers", ("height", "weight"), 2)
    assert kinds["pose"] == ("numbers", ("pose_0", "pose_1", "pose_2"), 3)
    assert kinds["alt"] == ("text", (), 16)
    rows = list(found_in(tmp_path / "out").values())
    assert sorted(map(str, rows)) == sorted(
        map(
            str,
            [
                {"genus": "cat", "tags": ["red", "big"], "size": [1.5, 2.0],
                 "pose": [1.0, 2.0, 3.0], "alt": "a red cat"},
                {"genus": "dog", "tags": None, "size": [-3.0, None], "pose": None, "alt": None},
                {"genus": None, "tags": ["old", "big"], "size": None,
                 "pose": [4.0, None, 6.0], "alt": "the dog"},
                {"genus": "owl", "tags": [], "size": [0.0, 1000.0],
                 "pose": [7.0, 8.0, 9.0], "alt": None},
            ],
        )
    )  # fmt: skip


def _table(tmp_path: Path, number: int = 9) -> tuple[Path, pyarrow.Table]:
    columns = {
        "image": [picture(i) for i in range(number)],
        "label": [i % 2 for i in range(number)],
        "genus": [(None, "ant", "bee")[i % 3] for i in range(number)],
        "tags": [None if i % 4 == 3 else ["a", "b", "c"][: i % 4] for i in range(number)],
        "pose": [None if i == 2 else [i / 4, None if i == 3 else -float(i)] for i in range(number)],
        "alt": [None if i % 5 == 0 else f"number {i}" for i in range(number)],
    }
    file = tmp_path / "t.parquet"
    table = pyarrow.table(columns)
    parquet.write_table(table, file)
    return file, table


def test_indices_and_gaps_of_lists(tmp_path: Path) -> None:
    """As pandas writes them: floats where some are missing, -1 for none."""
    columns = {
        "image": [picture(i) for i in range(4)],
        "genus": [0.0, 2.0, -1.0, None],
        "tags": [[1, 3], [0, -1], [None, 2], []],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    asked = ("genus:class", "tags:labels")
    packed = pack_with(tmp_path / "t.parquet", tmp_path / "out", column=asked)
    names = {column.name: column.names for column in packed.manifest.columns}
    assert names == {"genus": ("0", "1", "2"), "tags": ("0", "1", "2", "3")}
    found = found_in(tmp_path / "out")
    assert [found[i]["genus"] for i in range(4)] == ["0", "2", None, None]
    assert [found[i]["tags"] for i in range(4)] == [["1", "3"], ["0"], ["2"], []]


def test_lists_of_lists_are_refused(tmp_path: Path) -> None:
    columns = {"image": [picture(0), picture(1)], "tags": [[["a"]], None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="--column: expected a picture with tags, got none"):
        pack_with(tmp_path / "t.parquet", tmp_path / "out", column=("tags:labels",))


PARQUET = ("genus:class", "tags:labels", "pose:numbers", "alt:text")


def test_parquet_holds_what_pyarrow_reads(tmp_path: Path) -> None:
    file, table = _table(tmp_path)
    pack_with(file, tmp_path / "out", column=PARQUET, samples_per_shard=4)
    theirs = table.select(["genus", "tags", "pose", "alt"]).to_pylist()
    found = found_in(tmp_path / "out")
    assert [found[i] for i in range(9)] == theirs


@pytest.mark.matrix
def test_the_bytes_do_not_depend_on_workers(tmp_path: Path) -> None:
    file, _ = _table(tmp_path)
    pack_with(file, tmp_path / "one", column=PARQUET, samples_per_shard=2)
    pack_with(file, tmp_path / "two", run=with_processes(2), column=PARQUET, samples_per_shard=2)
    manifests = [read_manifest(tmp_path / name) for name in ("one", "two")]
    first, second = (contents(tmp_path / name) for name in ("one", "two"))
    assert first["train.columns"] == second["train.columns"]
    assert manifests[0].splits == manifests[1].splits


def test_a_second_start_goes_on_and_refuses_other_columns(tmp_path: Path) -> None:
    file, _ = _table(tmp_path)
    stopped = 0

    def run(tasks: Any, advance: Any) -> Any:
        nonlocal stopped
        for pair in run_here(tasks, advance):
            stopped += 1
            if stopped == 3:
                raise KeyboardInterrupt
            yield pair

    with pytest.raises(KeyboardInterrupt):
        pack_with(file, tmp_path / "one", run=run, column=PARQUET, samples_per_shard=2)
    with pytest.raises(ValueError, match="another source or other settings"):
        pack_with(file, tmp_path / "one", column=PARQUET[:2], samples_per_shard=2)
    pack_with(file, tmp_path / "one", column=PARQUET, samples_per_shard=2)
    pack_with(file, tmp_path / "two", column=PARQUET, samples_per_shard=2)
    first, second = (contents(tmp_path / name) for name in ("one", "two"))
    assert first["train.columns"] == second["train.columns"]
    assert pack_with(file, tmp_path / "one", column=PARQUET, samples_per_shard=2).was_there
    with pytest.raises(ValueError, match="other settings"):
        pack_with(file, tmp_path / "one", column=PARQUET[:2], samples_per_shard=2)


def test_a_data_set_of_ours_is_packed_again_with_its_columns(tmp_path: Path) -> None:
    file, _ = _table(tmp_path)
    pack_with(file, tmp_path / "one", column=PARQUET)
    pack_with(tmp_path / "one", tmp_path / "two", kind="packed")
    one, two = found_in(tmp_path / "one"), found_in(tmp_path / "two")
    assert sorted(map(str, one.values())) == sorted(map(str, two.values()))


def test_hugging_faces_names_of_classes_are_taken(tmp_path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(),
        genus=datasets.ClassLabel(names=["dog", "cat"]),
        tags=datasets.Sequence(datasets.ClassLabel(names=["red", "big", "old"])),
        age=datasets.Value("float32"),
    )
    columns = {
        "image": [Image.fromarray(smooth_picture(i, 20, 30)) for i in range(5)],
        "genus": [0, 1, -1, 1, 0],
        "tags": [[0], [2, 1], [], [1], [0, 2]],
        "age": [1.0, None, 3.0, math.nan, 5.0],
    }
    saved = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(str(tmp_path / "source"))
    asked = ("genus:class", "tags:labels", "age:numbers")
    packed = pack_with(tmp_path / "source", tmp_path / "out", column=asked)
    assert {c.name: c.names for c in packed.manifest.columns} == {
        "genus": ("dog", "cat"),
        "tags": ("red", "big", "old"),
        "age": ("age",),
    }
    found = found_in(tmp_path / "out")
    assert [found[i]["genus"] for i in range(5)] == ["dog", "cat", None, "cat", "dog"]
    assert [found[i]["tags"] for i in range(5)] == [
        ["red"],
        ["old", "big"],
        [],
        ["big"],
        ["red", "old"],
    ]
    assert [found[i]["age"] for i in range(5)] == [[1.0], None, [3.0], None, [5.0]]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (("genus",), "expected NAME:KIND or NAME:KIND=COLUMN with a kind of class, labels"),
        (("genus:sort",), "with a kind of class, labels, numbers, text, regions, got 'genus:sort'"),
        (("where:class",), r"expected one of image, .* got where"),
        (("a:class=genus,tags",), "expected one column of the source for class"),
        (("genus:class", "genus:text"), "expected a name once, got genus, genus"),
        (("1st:class=genus",), "expected a name of up to 40 letters"),
    ],
)
def test_a_wrong_flag_is_refused(tmp_path: Path, column: tuple[str, ...], told: str) -> None:
    file, _ = _table(tmp_path, 2)
    with pytest.raises(ValueError, match=told):
        pack_with(file, tmp_path / "out", column=column)


def test_a_source_without_columns_refuses_the_flag(tmp_path: Path) -> None:
    put(tmp_path / "source", "0.png")
    with pytest.raises(ValueError, match="--column: expected a table or a Hugging Face data set"):
        pack_with(tmp_path / "source", tmp_path / "out", column=("genus:class",))
