"""A data set of ours as a source: what it says of its samples is kept, not guessed of its tars."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.manifest import Manifest, read_manifest
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from tests.pipelines.packing.helpers import SMALL, pack_with, picture, put, rows_of

CAPTIONS = [["A red dog"], [], ["two dogs", "dogs on the grass"], ["a cat"], [], ["the cat again"]]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Six pictures of two splits, with captions, classes, groups and a column."""
    rows = [["path", "caption", "caption_2", "class", "group", "split", "age"]]
    for i, captions in enumerate(CAPTIONS):
        put(tmp_path / "source", f"{i}.png", picture(i))
        both = [*captions, "", ""][:2]
        split = "val" if i > 3 else "train"
        rows.append([f"{i}.png", *both, ("dog", "cat")[i > 2], f"g{i // 2}", split, str(10 * i)])
    with (tmp_path / "source/t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    out = tmp_path / "packed"
    asked: dict[str, Any] = {
        "caption_column": ("caption", "caption_2"), "group_column": "group",
        "split_column": "split", "label_column": "class", "column": ("age:numbers",),
        "license": "CC0", "attribution": "nobody",
    }  # fmt: skip
    pack_with(tmp_path / "source/t.csv", out, **asked)
    return out


def told(folder: Path, manifest: Manifest) -> dict[bytes, tuple[Any, ...]]:
    """What is known of each picture, by its bytes, with the pictures of its group."""
    found: dict[bytes, tuple[Any, ...]] = {}
    for split in manifest.splits:
        rows = sorted(rows_of(folder, split), key=lambda row: row.sample_id)
        table = SampleTable.open(folder, manifest, split)
        ages = {}
        if table.columns is not None:
            ages = dict(zip(table.rows["sample_id"].tolist(), table.columns.rows["age"].tolist(),
                            strict=True))  # fmt: skip
        for row in rows:
            group = {other.image for other in rows if other.group_id == row.group_id}
            captions = tuple(text.lower() for text in row.captions)
            name = manifest.class_names[row.label] if row.label >= 0 else None
            found[row.image] = (split, name, captions, group, ages.get(row.sample_id))
    return found


def test_all_that_is_known_is_kept(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = pack_with(packed, tmp_path / "again")
    said = " ".join(capsys.readouterr().err.split())
    assert "source: packed: a data set of m3i-fast data; another by --kind" in said
    before = read_manifest(packed)
    assert told(tmp_path / "again", again.manifest) == told(packed, before)
    assert len(told(packed, before)) == 6 and set(before.splits) == {"train", "heldout"}
    assert (again.manifest.licence, again.manifest.attribution) == ("CC0", "nobody")
    assert again.manifest.columns == before.columns
    assert pack_with(packed, tmp_path / "again").was_there
    same = {"num_merges": None, "context_length": None}
    assert pack_with(packed, tmp_path / "again", **same).was_there
    assert before.tokenizer.num_merges == SMALL["num_merges"]
    wide = pack_with(packed, tmp_path / "wide", num_merges=120, context_length=None).manifest
    assert (wide.tokenizer.num_merges, wide.tokenizer.context_length) == (120, 16)
    some = pack_with(packed, tmp_path / "some", limit=3, license="mine")
    kept = told(tmp_path / "some", some.manifest)
    assert len(kept) == 3 and some.manifest.licence == "mine"
    whole = told(packed, before)
    assert all(kept[image][:3] == whole[image][:3] for image in kept)


def test_an_index_is_packed_by_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for i in range(4):
            facts = {"alt": f"picture {i}", "caption": "of no use", "kind": "ab"[i % 2], "age": i}
            for name, content in (("png", picture(i)), ("json", json.dumps(facts).encode())):
                file = put(tmp_path, f"files/{i}.{name}", content)
                tar.add(file, f"{i}.{name}")
    flags = [
        "--caption-column",
        "json:alt",
        "--label-column",
        "json:kind",
        "--column",
        "age:numbers",
    ]
    assert main(["data", "index", str(tmp_path / "tars"), *flags]) == 0
    manifest = pack_with(tmp_path / "tars", tmp_path / "out").manifest
    found = told(tmp_path / "out", manifest)
    assert {image: tuple(of[1:3]) + (of[4],) for image, of in found.items()} == {
        picture(i): ("ab"[i % 2], (f"picture {i}",), [float(i)]) for i in range(4)
    }
    # Flags that say where things are in the tars' files are of these files.
    manifest = pack_with(tmp_path / "tars", tmp_path / "anew", json_caption=("caption",)).manifest
    assert {of[2] for of in told(tmp_path / "anew", manifest).values()} == {("of no use",)}
    with pytest.raises(ValueError, match="--json-caption: expected with --kind tars, which reads"):
        pack_with(tmp_path / "tars", tmp_path / "x", kind="packed", json_caption=("caption",))
