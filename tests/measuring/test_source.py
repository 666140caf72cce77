"""What a folder holds is listed, counted and dealt into splits before any picture is decoded."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from m3i_fast.cli import main
from m3i_fast.measuring.source import Source, SourceSettings, read_source
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.packing.items import Refused
from m3i_fast.pipelines.packing.readers.packed import Packed, of_json
from m3i_fast.pipelines.packing.shard_task import opened_reader
from tests.measuring.pictures import COLOURS, image_folder, picture


def source_of(path: Path, tmp_path: Path, **settings: object) -> Source:
    chosen = SourceSettings(path=path, cache_dir=tmp_path / "cache")
    return read_source(replace(chosen, **settings))  # type: ignore[arg-type]


def test_an_image_folder_has_its_splits(tmp_path: Path) -> None:
    source = source_of(image_folder(tmp_path / "data"), tmp_path)
    assert source.class_names == tuple(COLOURS)
    assert source.train is not None
    assert (source.train.name, len(source.train)) == ("train", 18)
    assert (source.measured.name, source.measured.num_labelled) == ("heldout", 18)
    assert source.measured.num_captioned == 0


def test_one_split_is_dealt_by_the_seed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", splits=())
    first, again = (source_of(folder, tmp_path, share=0.3) for _ in range(2))
    other = source_of(folder, tmp_path, share=0.3, seed=1)

    def names(source: Source) -> set[str]:
        return {item.name for item in source.measured.items}

    assert first.train is not None
    assert names(first) == names(again) != names(other)
    assert (len(first.measured), len(first.train)) == (5, 13)
    assert not names(first) & {item.name for item in first.train.items}
    assert any("drawn by seed 0" in note for note in first.notes)
    assert first.split_digest(first.measured) == again.split_digest(again.measured)
    assert first.split_digest(first.measured) != other.split_digest(other.measured)


def test_a_packed_data_set_has_the_counts_of_its_manifest(dataset: Path, tmp_path: Path) -> None:
    source = source_of(dataset, tmp_path)
    manifest = read_manifest(dataset)
    assert source.train is not None
    for split in (source.train, source.measured):
        info = manifest.split(split.name)
        counts = (len(split), split.num_labelled, split.num_captioned, len(split.captions))
        assert counts == (
            info.num_samples,
            info.num_labels,
            info.num_captions,
            info.total_captions,
        )
        assert len(np.unique(split.group)) == info.num_groups
    assert 0 < source.train.num_labelled < len(source.train)
    assert source.class_names == manifest.class_names
    reader = opened_reader(source.options)
    assert all(reader.read(item.place).startswith(b"\x89PNG") for item in source.measured.items)
    assert all(text == text.lower() for text in source.measured.captions)


def test_a_packed_sample_whose_bytes_changed_is_refused(dataset: Path, tmp_path: Path) -> None:
    source = source_of(dataset, tmp_path)
    item = source.measured.items[0]
    content = opened_reader(source.options).read(item.place)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in dataset.iterdir():
        stored = file.read_bytes()
        if file.suffix == ".tar" and content in stored:
            at = stored.index(content) + len(content) // 2
            stored = stored[:at] + bytes([stored[at] ^ 1]) + stored[at + 1 :]
        (copy / file.name).write_bytes(stored)
    damaged = source_of(copy, tmp_path)
    with pytest.raises(ValueError, match="the bytes differ from their checksum"):
        opened_reader(damaged.options).read(item.place)


def test_a_hugging_face_data_set_has_its_features_names(tmp_path: Path) -> None:
    for i, (_, colour) in enumerate(COLOURS.items()):
        picture(colour, i).save(tmp_path / f"{i}.png")
    columns = {
        "image": [str(tmp_path / f"{i}.png") for i in range(3)] * 4,
        "label": [0, 1, 2] * 4,
        "caption": [["one", "two"], ["three"], []] * 4,
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=[*COLOURS]),
        caption=datasets.Sequence(datasets.Value("string")),
    )
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows = rows.map(lambda row: row)  # stores the pictures' bytes
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "saved"))
    source = source_of(tmp_path / "saved", tmp_path, kind="huggingface")
    assert source.class_names == tuple(COLOURS)
    assert (source.measured.name, len(source.measured.captions)) == ("test", 12)
    assert np.array_equal(source.measured.caption_row[:3], [0, 0, 1])


def test_the_digest_follows_labels_and_files(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    before = source_of(folder, tmp_path)
    file = folder / "val" / "red" / "0.png"
    Image.open(file).rotate(90).save(file)
    after = source_of(folder, tmp_path)
    assert before.split_digest(before.measured) != after.split_digest(after.measured)
    assert before.train is not None and after.train is not None
    assert before.split_digest(before.train) == after.split_digest(after.train)


def test_wrong_requests_say_what_to_type(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="--split: expected one of heldout, train, got val"):
        source_of(folder, tmp_path, split="val")
    for names in (("a", "b"), ("a", "b", "c", "d")):
        wrong = f"for each of the 3 classes of .*order blue, green, red; got {len(names)}"
        with pytest.raises(ValueError, match=f"--class-names: expected a name {wrong}"):
            source_of(folder, tmp_path, classes=names)
    named = source_of(folder, tmp_path, classes=("sky", "grass", "rose"))
    assert "classes (--class-names): blue -> sky, green -> grass, red -> rose" in named.notes
    with pytest.raises(FileNotFoundError, match="got none at"):
        source_of(tmp_path / "absent", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected pictures, tars or Parquet files"):
        source_of(tmp_path / "empty", tmp_path)
    one = image_folder(tmp_path / "one", splits=())
    with pytest.raises(ValueError, match="--split: expected train, the only split"):
        source_of(one, tmp_path, split="heldout")


def test_captions_of_text_and_of_tokens_are_alike(tmp_path: Path) -> None:
    """Of the same pictures and captions, as a table and packed from it."""
    rows = ["file,caption,label"]
    for i, (name, colour) in enumerate(COLOURS.items()):
        picture(colour, i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,a {name} picture,{name}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows) + "\n")
    assert main(["data", "pack", str(table), str(tmp_path / "packed"), "--workers", "1"]) == 0
    plain = source_of(table, tmp_path, split="train")
    packed = source_of(tmp_path / "packed", tmp_path, split="train")
    assert sorted(plain.measured.captions) == sorted(packed.measured.captions)
    assert plain.class_names == packed.class_names
    assert json.dumps(packed.notes).count("packed") == 1


def test_two_image_columns_of_one_set_share_no_features(tmp_path: Path) -> None:
    """Nor a folder for their copies: the same rows, files and labels, and other pictures."""
    columns = {
        name: [{"bytes": _encoded(colour, i), "path": None} for i in range(6)]
        for name, colour in (("left", COLOURS["red"]), ("right", COLOURS["blue"]))
    }
    kinds = {name: datasets.Image() for name in columns}
    kinds["label"] = datasets.ClassLabel(names=["a", "b"])
    rows = datasets.Dataset.from_dict(
        {**columns, "label": [0, 1] * 3}, features=datasets.Features(kinds)
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for path in (tmp_path / "saved", tmp_path / "rows.parquet"):
        left, right = (source_of(path, tmp_path, image_column=name) for name in columns)
        assert left.split_digest(left.measured) != right.split_digest(right.measured)
        first = left.measured.items[0].place
        assert len({opened_reader(one.options).read(first) for one in (left, right)}) == 2
    assert left.options.spool != right.options.spool


def _encoded(colour: tuple[int, int, int], seed: int) -> bytes:
    content = io.BytesIO()
    picture(colour, seed).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("is_struct", [True, False])
def test_the_digest_follows_files_that_a_hugging_face_set_names(
    is_struct: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    names = [f"{i}.png" for i in range(4)]
    text = datasets.Value("string")
    kind = {"bytes": datasets.Value("binary"), "path": text} if is_struct else text
    column = [{"bytes": None, "path": name} for name in names] if is_struct else names
    features = datasets.Features(image=kind, label=datasets.ClassLabel(names=["a", "b"]))
    rows = datasets.Dataset.from_dict(
        {"image": column, "label": [0, 1, 0, 1]}, features=features
    ).select([3, 2, 1, 0])
    rows.save_to_disk(str(folder))
    for i in (0, 1, 2):
        picture((0, 0, 0), i).save(folder / names[i])
    before = source_of(folder, tmp_path, split="train")
    (refusal,) = before.refusals
    assert refusal.file == "train[0]" and "3.png: cannot be read: No such file" in refusal.reason
    assert [item.stamp[0] for item in before.measured.items] == [
        (folder / names[i]).stat().st_size for i in (2, 1, 0)
    ]
    picture((250, 0, 0), 9).save(folder / names[1])
    after = source_of(folder, tmp_path, split="train")
    assert before.split_digest(before.measured) != after.split_digest(after.measured)


def test_a_packed_set_of_many_shards_holds_few_open(dataset: Path, tmp_path: Path) -> None:
    """Each shard once more under a hundred names, by a process that may have 100 open files."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    code = f"""
import os, resource, sys
from pathlib import Path
from m3i_fast.pipelines.packing.items import SourceOptions
from m3i_fast.pipelines.packing.readers import packed
reader = packed.Packed(SourceOptions(path=Path({str(copy)!r}), kind="packed"))
listing = reader.list()
tables = reader._tables
item = listing.items[0]
split = item.place[0]
shard = int(tables[split].rows[item.place[1]]["shard"])
names = list(tables[split].shard_files)
object.__setattr__(tables[split], "shard_files", names)
file = reader.options.path / names[shard]
expected = reader.read(item.place)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
def opened():
    return len(os.listdir("/proc/self/fd"))
for i in range(300):
    link = file.with_name(f"{{i}}.tar")
    os.link(file, link)
    names[shard] = link.name
    assert reader.read(item.place) == expected
assert opened() > packed.MAX_OPEN
before = opened()
child = os.fork()
if child == 0:
    for i in range(300):
        names[shard] = f"{{i}}.tar"
        assert reader.read(item.place) == expected
    os._exit(opened() - before)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
del reader
assert opened() < before - packed.MAX_OPEN + 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_fails_leaves_no_packed_sample_out(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Packed, "_pread", lambda *_: fail)
    with pytest.raises(OSError, match="Input/output error"):
        source_of(dataset, tmp_path)


@pytest.mark.parametrize("text", ['["a"]', '"a"', "3", '{"text": 3}'])
def test_json_that_holds_no_caption_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="expected a JSON object with text as text, got"):
        of_json(text, "text")
    assert of_json('{"text": "a cat"}', "text") == "a cat"
    assert of_json("{}", "text") == ""


def test_a_row_a_caption_is_one_picture_with_all_of_them(tmp_path: Path) -> None:
    """As Flickr30k and COCO have it, with a delimiter and a folder of pictures of their own."""
    (tmp_path / "images").mkdir()
    rows = ["image|caption|family"]
    for i in range(4):
        picture((10 * i, 0, 0), i).save(tmp_path / "images" / f"{i}.png")
        rows += [f"{i}.png|caption {k} of {i}|{i // 2}" for k in range(5)]
    (tmp_path / "results.csv").write_text("\n".join(rows) + "\n")
    source = source_of(
        tmp_path / "results.csv",
        tmp_path,
        image_root=tmp_path / "images",
        delimiter="|",
        group_column="family",
    )
    assert (len(source.measured), len(source.measured.captions)) == (4, 20)
    assert source.refusals == ()
    assert len(np.unique(source.measured.group)) == 2
    assert any(note.startswith("16 rows name a picture of an earlier row") for note in source.notes)
