"""Regions packed of tables, of Hugging Face's data sets, of tars, and of files beside pictures."""

from __future__ import annotations

import io
import json
import tarfile
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
from tests.pipelines.packing.helpers import (
    TOKENIZER,
    contents,
    pack_with,
    picture,
    put,
    refused_of,
)
from tests.shared.pipelines.data import encode_image, smooth_picture

HEIGHT, WIDTH = 20, 30  # of `picture`
Told = list[tuple[list[float], str]] | None  # [x, y, width, height] in pixels, text

SAID: dict[int, Told] = {
    0: [([3, 2, 10, 8], "a red cat"), ([0, 0, 30, 20], "all of it")],
    1: [],
    2: None,
    3: [([15.5, 10.25, 14.5, 9.75], "the dog")],
}


def objects(said: Told) -> list[dict[str, Any]] | None:
    return None if said is None else [{"bbox": box, "text": text} for box, text in said]


def found_in(out: Path, size: tuple[int, int] = (HEIGHT, WIDTH)) -> dict[int, Told]:
    """The regions of each sample by its id, in pixels of a picture of height and width."""
    table = SampleTable.open(out, read_manifest(out), "train")
    assert table.columns is not None
    (column,) = table.columns.columns
    height, width = size
    rows: dict[int, Told] = {}
    for number, sample in enumerate(np.asarray(table.rows["sample_id"]).tolist()):
        values = column.value(table.columns.rows[number][column.name])
        rows[sample] = values and [
            (
                [left * width, top * height, (right - left) * width, (bottom - top) * height],
                TOKENIZER.decode(ids),
            )
            for (top, left, bottom, right), ids in values
        ]
    return rows


def expect(found: dict[int, Told], said: dict[int, Told]) -> None:
    assert found.keys() == said.keys()
    for number, regions in said.items():
        of_sample = found[number]
        assert (of_sample is None) == (regions is None)
        for (box, text), (given, expected) in zip(of_sample or [], regions or [], strict=True):
            assert text == expected and box == pytest.approx(given, abs=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        put(tmp_path / "source", f"images/{i}.png", picture(i))
    return tmp_path / "source"


def pack_folder(folder: Path, content: Any, name: str = "regions.json") -> Any:
    text = content if isinstance(content, str) else json.dumps(content)
    put(folder, name, text.encode())
    return pack_with(folder, folder.parent / "out", column=(f"objects:regions={name}",))


def test_a_table_of_text(tmp_path: Path) -> None:
    lines = ["file\tobjects"]
    for i, said in SAID.items():
        put(tmp_path, f"{i}.png", picture(i))
        lines.append(f"{i}.png\t" + ("" if said is None else json.dumps(objects(said))))
    put(tmp_path, "t.tsv", "\n".join(lines).encode())
    packed = pack_with(tmp_path / "t.tsv", tmp_path / "out", column=("objects:regions",))
    (column,) = packed.manifest.columns
    assert (column.kind, column.size, packed.refused) == ("regions", 2, ())
    expect(found_in(tmp_path / "out"), SAID)
    pack_with(tmp_path / "out", tmp_path / "again", kind="packed")
    one, two = (found_in(tmp_path / name).values() for name in ("out", "again"))
    assert sorted(map(str, one)) == sorted(map(str, two))  # to the bit; numbered anew


@pytest.mark.parametrize("of_lists", [False, True])
def test_parquet_and_what_hugging_face_saves(tmp_path: Path, of_lists: bool) -> None:
    """A list of objects, or an object of lists as older `Sequence` features have it."""
    values: list[Any] = [objects(said) for said in SAID.values()]
    if of_lists:
        values = [
            v and {key: [each[key] for each in v] for key in ("bbox", "text")} for v in values
        ]
        values[1] = {"bbox": [], "text": []}
    columns = {"image": [picture(i) for i in range(4)], "objects": values}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    pack_with(tmp_path / "t.parquet", tmp_path / "out", column=("objects:regions",))
    expect(found_in(tmp_path / "out"), SAID)
    images = [Image.fromarray(smooth_picture(i, HEIGHT, WIDTH)) for i in range(4)]
    saved = datasets.Dataset.from_dict({"image": images, "objects": values})
    saved.save_to_disk(str(tmp_path / "saved"))
    pack_with(tmp_path / "saved", tmp_path / "hf", column=("boxes:regions=objects",))
    expect(found_in(tmp_path / "hf"), SAID)


def test_the_json_of_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i, said in SAID.items():
            facts = {"caption": "one"} if said is None else {"objects": objects(said)}
            for name, content in ((f"{i}.png", picture(i)), (f"{i}.json", json.dumps(facts))):
                member = tarfile.TarInfo(name)
                data = content.encode() if isinstance(content, str) else content
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    asked = ("objects:regions", "said:text=caption")
    packed = pack_with(tmp_path / "t.tar", tmp_path / "out", column=asked[:1])
    assert packed.refused == ()
    expect(found_in(tmp_path / "out"), SAID)
    both = pack_with(tmp_path / "t.tar", tmp_path / "both", column=asked)
    assert [c.kind for c in both.manifest.columns] == ["regions", "text"]
    known = both.manifest.splits["train"].columns
    assert known is not None and known.num_known == {"objects": 3, "said": 1}


def coco() -> dict[str, Any]:
    """As COCO's instances and captions have it; picture 2 is not listed."""
    listed = {number: said for number, said in SAID.items() if said is not None}
    annotations = [
        {"image_id": 100 + number, "bbox": box, "iscrowd": 0}
        | ({"caption": text} if number else {"category_id": sum(text.encode())})
        for number, said in listed.items()
        for box, text in said
    ]
    return {
        "images": [{"id": 100 + i, "file_name": f"{i}.png", "width": 9} for i in listed],
        "annotations": annotations,
        "categories": [{"id": sum(text.encode()), "name": text} for _, text in SAID[0] or []],
    }


def test_cocos_file_beside_a_folder(folder: Path) -> None:
    packed = pack_folder(folder, coco())
    assert packed.refused == ()
    expect(found_in(folder.parent / "out"), SAID)


def test_a_line_a_picture(folder: Path) -> None:
    """As `metadata.jsonl` of Hugging Face's image folders; names with and without folders."""
    lines = [
        {"file_name": f"images/{i}.png" if i else "0.png", "objects": objects(said)}
        for i, said in SAID.items()
        if said is not None
    ]
    pack_folder(folder, "\n".join(map(json.dumps, lines)) + "\n", "metadata.jsonl")
    expect(found_in(folder.parent / "out"), SAID)


def test_visual_genome_and_several_sentences(folder: Path) -> None:
    """Pictures by their number, sides as fields, and RefCOCO's sentences of one box."""
    regions = [{"x": 3, "y": 2, "width": 10, "height": 8, "phrase": "a red cat"}]
    corners = {"xyxy": [0, 0, 30, 20], "sentences": [{"sent": "all of it"}, {"sent": "whole"}]}
    pack_folder(folder, [{"id": 3, "regions": regions}, {"image_id": 1, "regions": [corners]}])
    whole: list[float] = [0, 0, 30, 20]
    expect(
        found_in(folder.parent / "out"),
        {
            0: None,
            1: [(whole, "all of it"), (whole, "whole")],
            2: None,
            3: [([3, 2, 10, 8], "a red cat")],
        },
    )


def test_scaled_and_turned_pictures_keep_their_regions(tmp_path: Path) -> None:
    """Boxes are in pixels of the upright picture before it is scaled."""
    image = Image.fromarray(smooth_picture(0, 64, 128))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn: the upright picture is 128 x 64 pixels
    content = io.BytesIO()
    image.save(content, "JPEG", exif=exif)
    put(tmp_path / "source", "0.jpg", content.getvalue())
    said: Told = [([0, 64, 64, 64], "the lower half")]
    put(
        tmp_path / "source", "r.jsonl",
        json.dumps({"image": "0.jpg", "regions": objects(said)}).encode(),
    )  # fmt: skip
    packed = pack_with(
        tmp_path / "source", tmp_path / "out", column=("o:regions=r.jsonl",), for_gpu=32
    )
    assert packed.manifest.max_image_size == (64, 32)
    expect(found_in(tmp_path / "out", (128, 64)), {0: said})


def test_texts_are_cut_to_their_room(tmp_path: Path) -> None:
    put(tmp_path, "0.png", picture(0))
    long = " ".join(["word"] * 60)
    cell = json.dumps(objects([([0, 0, 5, 5], long)]))
    put(tmp_path, "t.tsv", f"file\to\n0.png\t{cell}\n".encode())
    packed = pack_with(
        tmp_path / "t.tsv", tmp_path / "out", column=("o:regions",), context_length=77
    )
    assert packed.num_cut == 1
    table = SampleTable.open(tmp_path / "out", packed.manifest, "train")
    assert table.columns is not None
    row = table.columns.rows[0]["o"][0]
    assert row[4] >= 0 and row[-1] == TOKENIZER.encode("word")[-1]  # the end is kept


WRONG = [
    ({"bbox": [25, 2, 10, 8], "text": "a"},
     "region 0: expected a box inside the upright picture of 30 x 20 pixels, got x 25 to 35"),
    ({"bbox": [-4, 2, 10, 8], "text": "a"}, "got x -4 to 6 and y 2 to 10"),
    ({"bbox": [3, 2, 0, 8], "text": "a"}, "bbox: expected a width and height > 0, got"),
    ({"bbox": [3, 2, 5, -8], "text": "a"}, "bbox: expected a width and height > 0, got"),
    ({"xyxy": [9, 2, 5, 8], "text": "a"},
     r"xyxy: expected left < right and top < bottom, got \[9.0, 2.0, 5.0, 8.0\]"),
    ({"bbox": [3, 2, float("nan"), 8], "text": "a"}, "bbox: expected finite numbers, got"),
    ({"bbox": [3, 2, 5], "text": "a"}, r"bbox: expected 4 numbers, got \[3, 2, 5\]"),
    ({"x": 3, "y": 2, "width": 5, "text": "a"}, "x, y, width, height: expected 4 numbers, got"),
    ({"bbox": "none", "text": "a"}, "bbox: expected 4 numbers, got none"),
    ({"bbox": [3, 2, 5, 5]}, "text: expected a text, got None"),
    ({"bbox": [3, 2, 5, 5], "text": " "}, "text: expected a text, got ' '"),
    ({"bbox": [3, 2, 5, 5], "category": 7}, "category: expected a text, got 7"),
    ([3, 2, 5, 5], "region 0: expected an object, got list"),
]  # fmt: skip


@pytest.mark.parametrize(("region", "told"), WRONG)
def test_what_is_no_region_is_refused_by_file_sample_and_field(
    folder: Path, region: Any, told: str
) -> None:
    lines = [
        {"file_name": "0.png", "regions": objects(SAID[0])},
        {"file_name": "3.png", "regions": [region]},
    ]
    packed = pack_folder(folder, "\n".join(map(json.dumps, lines)), "r.jsonl")
    ((name, reason),) = refused_of(packed).items()
    assert name == "images/3.png" and reason.startswith("objects")
    pytest.raises(ValueError, _raise, reason).match(told)
    assert found_in(folder.parent / "out").keys() == {0, 1, 2}


def _raise(reason: str) -> None:
    raise ValueError(reason)


def test_a_pixel_of_rounding_is_clipped(folder: Path) -> None:
    said: Told = [([-0.6, 0, 31.2, 20.9], "all")]
    pack_folder(folder, [{"file_name": "0.png", "regions": objects(said)}])
    expect({0: found_in(folder.parent / "out")[0]}, {0: [([0, 0, 30, 20], "all")]})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "r.json: Expecting"),
        ({"images": []}, "expected COCO's images and annotations, or a list"),
        ({"images": [{"id": 1}], "annotations": []}, "got none of 'file_name'"),
        ([{"file_name": "0.png"}], "entry 0: expected a list as one of regions, objects, annot"),
        ([{"regions": []}], "entry 0: expected the picture's name as one of file_name"),
        ([{"file_name": "x.png", "regions": []}], "such as 'images/0.png', got 'x.png'"),
        ([], "expected names of pictures such as 'images/0.png', got none"),
        ([{"file_name": "0", "regions": []}], "expected names that one picture has, got '0'"),
    ],
)
def test_a_file_that_is_none_is_refused(folder: Path, content: Any, told: str) -> None:
    put(folder, "others/0.jpg", encode_image(smooth_picture(9, 8, 8), "JPEG"))
    with pytest.raises(ValueError, match=told):
        pack_folder(folder, content, "r.json")


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="none.json: cannot be read: No such file"):
        pack_with(folder, folder.parent / "out", column=("o:regions=none.json",))
    with pytest.raises(ValueError, match="regions may stand in a file, NAME:regions=FILE.json"):
        pack_with(folder, folder.parent / "out", column=("o:regions",))


def test_the_bytes_are_the_same_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    pack_folder(folder, coco())
    moved = folder.rename(tmp_path / "moved")
    flags: dict[str, Any] = {"column": ("objects:regions=regions.json",), "name": "out"}
    pack_with(moved, tmp_path / "second", **flags)
    one, two = (contents(tmp_path / name) for name in ("out", "second"))
    assert one == two
