"""Fields of tars' json become named columns where the tars lie, as `data pack` makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m3i_fast.cli import main
from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.manifest import how_to_restore, read_manifest
from m3i_fast.pipelines.dataset.pictures import decode_pixels, upright_size
from m3i_fast.pipelines.indexing import build
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.tar_members import sample_files
from tests.pipelines.indexing.tars import (
    JPEG,
    Files,
    contents,
    index,
    refused,
    table,
    write_tar,
)
from tests.shared.pipelines.data import encode_image, smooth_picture

FACTS: list[dict[str, Any]] = [
    {"paint": "red", "tags": ["b", "a"], "sizes": [1.5, -2], "score": 0.25, "more": "a red dog"},
    {"paint": None, "tags": [], "sizes": [None, 7], "regions": []},
    {"paint": "blue", "sizes": [3, 4], "score": 1e9, "more": "", "regions": None},
    {},
    {"paint": "red", "tags": ["c"], "score": None, "more": "two dogs on the grass",
     "regions": [{"bbox": [3, 2, 6, 10], "text": "dog"}, {"xyxy": [0, 0, 30, 20], "text": "all"}]},
]  # fmt: skip
COLUMNS = ("paint:class", "tags:labels", "sizes:numbers", "value:numbers=score", "more:text",
           "regions:regions")  # fmt: skip


def as_files(facts: list[dict[str, Any]], start: int = 0) -> Files:
    """A picture of 20 x 30 with its json each."""
    files: Files = []
    for i, fact in enumerate(facts, start):
        files += [(f"{i:09d}.jpg", encode_image(smooth_picture(i, 20, 30), "JPEG"))]
        files += [(f"{i:09d}.json", json.dumps(fact).encode())]
    return files


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    write_tar(tmp_path / "tars" / "0.tar", as_files(FACTS[:2]))
    write_tar(tmp_path / "tars" / "1.tar", as_files(FACTS[2:], start=2))
    return tmp_path / "tars"


def indexed(tars: Path, *flags: str) -> list[str]:
    return [
        "data",
        "index",
        str(tars),
        "--caption-column",
        "none",
        "--label-column",
        "none",
        *flags,
    ]


def with_flags(columns: tuple[str, ...]) -> list[str]:
    return [word for flag in columns for word in ("--column", flag)]


def values_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the columns say of each sample, by the number that its key has."""
    opened, infos = table(folder), read_manifest(folder).columns
    assert opened.columns is not None
    found = {}
    for row, content in zip(opened.columns.rows, contents(folder), strict=True):
        key, _ = sample_files(content)
        number = key[:9]  # of a pack with the name of the tar behind it
        found[number] = {each.name: each.value(row[each.name]) for each in infos}
    return found


def test_an_index_has_what_a_pack_has(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in tars.iterdir()}
    assert main(indexed(tars, *with_flags(COLUMNS))) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "paint class of 2 known of 3, tags labels of 3 known of 3, sizes numbers of 2" in said
    assert {file: file.read_bytes() for file in before} == before
    packed = tmp_path / "packed"
    flags = ["--label-column", "", "--json-caption", "none"]
    assert main(["data", "pack", str(tars), str(packed), *flags, *with_flags(COLUMNS)]) == 0
    ours, theirs = read_manifest(tars), read_manifest(packed)
    assert ours.columns == theirs.columns
    assert [each.names for each in ours.columns[:4]] == [
        ("blue", "red"), ("a", "b", "c"), ("sizes_0", "sizes_1"), ("score",),
    ]  # fmt: skip
    found = values_of(tars)
    assert found == values_of(packed) and len(found) == 5
    assert found["000000000"]["tags"] == [1, 0] and found["000000001"]["tags"] == []
    assert found["000000001"]["sizes"] == [None, 7] and found["000000003"]["sizes"] is None
    assert found["000000002"]["value"] == [1e9] and found["000000002"]["more"] is None
    assert found["000000001"]["regions"] == [] and found["000000002"]["regions"] is None
    (top, left, bottom, right), _ = found["000000004"]["regions"][0]
    assert [top, left, bottom, right] == pytest.approx([2 / 20, 3 / 30, 12 / 20, 9 / 30])
    for name in ("num_known", "mean", "std", "count"):
        of_index, of_pack = (getattr(m.splits["train"].columns, name) for m in (ours, theirs))
        assert of_index.keys() == of_pack.keys()
        for column, numbers in of_pack.items():
            np.testing.assert_allclose(of_index[column], numbers, rtol=1e-12)
    assert main(["data", "verify", str(tars)]) == 0


def test_a_batch_has_them(tars: Path) -> None:
    assert main(indexed(tars, *with_flags(COLUMNS))) == 0
    cfg = LoaderConfig(path=tars, batch_size=5)
    batch = next(Loader(cfg))
    order = np.argsort(batch.sample_id.numpy())
    paint = batch.columns["paint"].numpy()[order]
    assert paint.tolist() == [1, -1, 0, -1, 1]
    assert batch.columns["value"].numpy()[order][[0, 2], 0].tolist() == [0.25, 1e9]


def test_nothing_depends_on_processes_and_places(tars: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"caption": None, "label": None, "named": COLUMNS[:4]}
    for name, workers in (("one", 1), ("two", 2)):
        index(tars, out=tmp_path / name, workers=workers, **options)
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two and "train.columns" in one
    index(tars, out=tmp_path / "one", caption=None, label=None)
    assert not (tmp_path / "one/train.columns").exists()  # of another index


def test_a_killed_index_goes_on(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"caption": None, "label": None, "named": COLUMNS[:2]}

    def stopping(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "with_columns", stopping)
    with pytest.raises(KeyboardInterrupt):
        index(tars, **options)
    assert not (tars / "manifest.json").exists()
    monkeypatch.undo()
    result = min((tars / build.RESULTS).iterdir())
    result.write_bytes(result.read_bytes()[:-1])  # a half-written one is done again
    index(tars, **options)
    assert values_of(tars)["000000000"] == {"paint": 1, "tags": [1, 0]}
    command = how_to_restore(tars, read_manifest(tars))
    assert command.endswith("--column paint:class --column tags:labels")


def test_boxes_are_of_the_upright_picture(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image = encode_image(smooth_picture(0, 20, 30), "JPEG", exif=turned)
    assert upright_size(image) == decode_pixels(image, 9999).shape[:2] == (30, 20)
    assert upright_size(JPEG) == (20, 30)
    box = {"regions": [{"bbox": [0, 0, 20, 15], "text": "upper half"}]}
    files = [("0.jpg", image), ("0.json", json.dumps(box).encode())]
    write_tar(tmp_path / "tars/0.tar", files)
    index(tmp_path / "tars", caption=None, label=None, named=("regions:regions",))
    ((box_found, _),) = values_of(tmp_path / "tars")["0"]["regions"]
    assert box_found == pytest.approx([0, 0, 0.5, 1])


def test_what_is_wrong_is_named(tars: Path, tmp_path: Path, capsys: Any) -> None:
    wrong = [
        {"paint": "red", "score": "much"},
        {"paint": ["red"]},
        {"regions": [{"bbox": [0, 0, 99, 1], "text": "far"}]},
    ]
    write_tar(tars / "2.tar", as_files(wrong, start=5))
    index(tars, caption=None, label=None, named=COLUMNS)
    assert [(row["sample"], row["reason"]) for row in refused(tars)] == [
        ("000000005", "value: expected a number, got 'much'"),
        ("000000006", "paint: expected text, got list"),
        ("000000007", "regions: region 0: expected a box inside the upright picture of 30 x 20 "
                      "pixels, got x 0 to 99 and y 0 to 1"),
    ]  # fmt: skip
    assert len(values_of(tars)) == 5

    for flag, reason in {
        "paint:colour": "expected NAME:KIND or NAME:KIND=COLUMN with a kind of",
        "hue:class": "expected a picture with hue, got none",
        "boxes:regions=boxes.json": "expected fields of the tars' json, got a file for boxes",
    }.items():
        assert main(indexed(tars, "--out", str(tmp_path / "out"), "--column", flag)) == 2
        assert reason in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out/manifest.json").exists()

    write_tar(tars / "3.tar", as_files([{"sizes": [1, 2, 3]}], start=9))
    with pytest.raises(ValueError, match=r"0\.tar: sample 0: sizes: expected 3 numbers, got 2, as"):
        index(tars, caption=None, label=None, named=("sizes:numbers",))
    assert read_manifest(tars).splits["train"].num_samples == 5  # the index before stays
