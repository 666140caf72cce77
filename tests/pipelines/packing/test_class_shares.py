"""Columns with the class of a share of the pictures; oracle: counts by hand from the table."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.packing.workers import with_processes
from tests.pipelines.packing.helpers import contents, pack_with, put

SHARES = {"class_10": 0.1, "class_50": 0.5, "few": 0.001}
FLAGS = tuple(f"{name}={share}" for name, share in SHARES.items())


def _folder(root: Path) -> Path:
    """Twenty pictures of each of three classes to train with, four each held out."""
    for kind in ("cat", "dog", "owl"):
        for split, number in (("train", 20), ("val", 4)):
            for i in range(number):
                put(root, f"{split}/{kind}/{i:02d}.png")
    return root


def _known(out: Path, split: str) -> tuple[dict[int, int], dict[str, dict[int, int]]]:
    """Class of every sample by its id, and the columns' where they have one."""
    table = SampleTable.open(out, read_manifest(out), split)
    ids = np.asarray(table.rows["sample_id"]).tolist()
    assert table.columns is not None
    columns = {
        name: {i: int(v) for i, v in zip(ids, table.columns.rows[name], strict=True) if v >= 0}
        for name in SHARES
    }
    return dict(zip(ids, np.asarray(table.rows["label"]).tolist(), strict=True)), columns


def test_a_share_of_each_class_is_kept_and_the_class_stays_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    packed = pack_with(_folder(tmp_path / "in"), out, class_share=FLAGS)
    said = " ".join(capsys.readouterr().err.split())
    assert "class_10: the class of 6 of 60 pictures of train" in said
    assert [(c.name, c.kind, c.names) for c in packed.manifest.columns] == [
        (name, "class", ("cat", "dog", "owl")) for name in SHARES
    ]
    for split, number in (("train", 20), ("heldout", 4)):
        class_of, columns = _known(out, split)
        assert Counter(class_of.values()) == {0: number, 1: number, 2: number}
        for name, share in SHARES.items():
            each = max(round(share * number), 1)
            assert Counter(columns[name].values()) == {0: each, 1: each, 2: each}
            assert all(class_of[i] == label for i, label in columns[name].items())
        assert columns["few"].keys() <= columns["class_10"].keys() <= columns["class_50"].keys()


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in")
    for name, flags in {
        "one": {"class_share": FLAGS, "samples_per_shard": 7},
        "two": {"class_share": FLAGS, "samples_per_shard": 7},
        "other": {"class_share": FLAGS, "samples_per_shard": 7, "seed": 1},
    }.items():
        run = {"run": with_processes(2)} if name == "two" else {}
        pack_with(source, tmp_path / name, name="set", **run, **flags)  # type: ignore[arg-type]
    one, two, other = (_known(tmp_path / name, "train") for name in ("one", "two", "other"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one == two and one[0] == other[0] and one[1] != other[1]


def test_shares_stand_beside_columns_of_a_table_and_a_share_held_out(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'cat' if i % 2 else 'dog'},{i}" for i in range(40)]
    rows += [f"{i}.png,,{i}" for i in range(40, 44)]  # of no class
    for i in range(44):
        put(tmp_path, f"{i}.png")
    table = put(tmp_path, "t.csv", "\n".join(["file,class,size", *rows]).encode())
    out = tmp_path / "out"
    packed = pack_with(
        table, out, column=("size:numbers",), class_share=("half=0.5",), split=("heldout=0.25",)
    )
    assert [c.name for c in packed.manifest.columns] == ["size", "half"]
    found = SampleTable.open(out, packed.manifest, "train")
    assert found.columns is not None
    half = np.asarray(found.columns.rows["half"])
    label = np.asarray(found.rows["label"])
    for kind in (0, 1):
        assert (half == kind).sum() == round(0.5 * (label == kind).sum())
    assert (half[label < 0] < 0).all() and (label < 0).any()
    assert np.asarray(found.columns.rows["size"])[:, 0].tolist() == found.rows["sample_id"].tolist()


def test_a_data_set_without_shares_is_described_as_before(tmp_path: Path) -> None:
    source = _folder(tmp_path / "in")
    plain = pack_with(source, tmp_path / "plain")
    assert "class_shares" not in json.dumps(plain.manifest.settings)
    pack_with(source, tmp_path / "shares", class_share=FLAGS)
    again = pack_with(source, tmp_path / "shares", class_share=FLAGS)
    assert again.was_there
    with pytest.raises(ValueError, match="of other settings"):
        pack_with(source, tmp_path / "shares", class_share=FLAGS[:1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("half=2",), r"share in \(0, 1\] and each name once, got 'half=2'"),
        (("half",), "got 'half'"),
        (("half=0",), "got 'half=0'"),
        (("half=0.5", "half=0.6"), "each name once, got 'half=0.6'"),
        (("1 %=0.01",), "expected a name of up to 40 letters, digits and _, got '1 %'"),
    ],
)
def test_a_wrong_share_is_refused(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_with(_folder(tmp_path / "in"), tmp_path / "out", class_share=flags)


def test_a_source_without_classes_or_with_a_column_of_that_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.png")
    with pytest.raises(ValueError, match="expected pictures with classes to keep a share of"):
        pack_with(tmp_path / "in", tmp_path / "out", class_share=("half=0.5",))
    put(tmp_path, "a.png")
    table = put(tmp_path, "t.csv", b"file,class,size\na.png,cat,1\n")
    with pytest.raises(ValueError, match="expected new names, got columns size"):
        pack_with(table, tmp_path / "out", column=("size:numbers",), class_share=("size=0.5",))
