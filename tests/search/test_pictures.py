"""What is searched is what was packed, or what lies in the folder, with its names and classes."""

from __future__ import annotations

import io
import json
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.annotations.tokenizer import Tokenizer
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.sample_table import BAD, SampleTable, write_table
from m3i_fast.search import pictures as pictures_module
from m3i_fast.search.pictures import decode, open_pictures
from tests.shared.pipelines.data import edit_manifest, encode_image, info, sample, smooth_picture

TOKENIZER = Tokenizer(num_merges=300, context_length=16)


def tokens(*texts: str) -> tuple[object, ...]:
    return tuple(TOKENIZER.encode(text) for text in texts)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Two splits with none, one and two captions a picture."""
    texts: list[tuple[str, ...]] = [(), ("a cat",), ("two dogs", "dogs in the rain")]
    train = [
        sample(i, encode_image(smooth_picture(i, 40, 60)), captions=tokens(*texts[i % 3]))
        for i in range(6)
    ]
    heldout = [sample(9, encode_image(smooth_picture(9, 40, 60)), captions=(), label=-1)]
    about = info(tokenizer=TOKENIZER.info, name="mine")
    splits = {"train": train, "heldout": heldout}
    return write_dataset(tmp_path / "mine", splits, about, seed=0, samples_per_shard=4)


def test_pictures_captions_and_labels_are_those_that_were_packed(
    packed: Path, tmp_path: Path
) -> None:
    with open_pictures(packed, None, tmp_path) as found:
        assert (found.name, found.class_names) == ("mine", ("a", "b", "c"))
        assert len(found.label) == 7 and found.has_captions
        seen = {}
        for row, label in enumerate(found.label):
            name, captions = found.about(row)
            split, _, number = name.rpartition(", sample ")
            seen[int(number)] = split
            pixels = decode(found.read(row))
            assert np.array_equal(pixels, smooth_picture(int(number), 40, 60))
            expected = [(), ("a cat",), ("two dogs", "dogs in the rain")][int(number) % 3]
            assert captions == (() if split == "heldout" else expected)
            assert label == (-1 if split == "heldout" else int(number) % 3)
        assert seen == {**dict.fromkeys(range(6), "train"), 9: "heldout"}
    with open_pictures(packed, "heldout", tmp_path) as alone:
        assert alone.label.tolist() == [-1] and alone.digest != found.digest
        assert not alone.has_captions


def test_samples_marked_as_bad_are_left_out(packed: Path, tmp_path: Path) -> None:
    manifest = read_manifest(packed)
    rows = np.array(SampleTable.open(packed, manifest, "train").rows)
    with open_pictures(packed, "train", tmp_path) as before:
        names = [before.about(row).name for row in range(6)]
    rows["flags"][1] |= BAD
    table = asdict(write_table(packed / "train.samples", [rows]))
    edit_manifest(packed, lambda raw: raw["splits"]["train"].update(table=table, num_bad=1))
    with open_pictures(packed, "train", tmp_path) as after:
        left = [after.about(row).name for row in range(len(after.label))]
        assert list(after.notes) == ["1 samples are marked as bad and left out"]
    assert left == names[:1] + names[2:]


def test_bytes_that_changed_since_packing_are_told(packed: Path, tmp_path: Path) -> None:
    manifest = read_manifest(packed)
    (row,) = SampleTable.open(packed, manifest, "heldout").rows
    shard = packed / manifest.split("heldout").shards[0].file
    content = bytearray(shard.read_bytes())
    content[int(row["offset"]) + 700] ^= 1
    shard.write_bytes(content)
    with open_pictures(packed, "heldout", tmp_path) as found:
        with pytest.raises(ValueError, match="heldout, sample 9: the bytes are not those"):
            found.read(0)


def test_a_folder_has_classes_and_names_what_it_leaves_out(folder: Path, tmp_path: Path) -> None:
    with open_pictures(folder, None, tmp_path) as found:
        assert (found.name, found.class_names) == ("animals", ("cat", "dog"))
        names = [found.about(row).name for row in range(len(found.label))]
        assert names == [
            *("cat/0.jpg", "cat/1.png", "cat/2.gif", "cat/turned.jpg"),
            *("dog/0.jpg", "dog/1.png", "dog/2.gif", "dog/damaged.png"),
        ]
        assert found.label.tolist() == [0] * 4 + [1] * 4
        assert any("1 files are not called like pictures: 1 .txt" in note for note in found.notes)
        assert not found.has_captions and found.about(0).captions == ()
        before = found.digest
    (folder / "cat" / "new.png").write_bytes((folder / "cat" / "1.png").read_bytes())
    with open_pictures(folder, None, tmp_path) as found:
        assert found.digest != before
    (folder / "cat" / "new.png").unlink()
    with open_pictures(folder, None, tmp_path) as found:
        assert found.digest == before


def test_pixels_are_those_of_pillow_whatever_the_kind(folder: Path) -> None:
    for name in ("0.jpg", "1.png", "2.gif", "turned.jpg"):
        content = (folder / "cat" / name).read_bytes()
        opened = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.array_equal(decode(content), np.asarray(opened.convert("RGB"))), name


def bomb() -> bytes:
    """A small PNG that says it has 30000 x 30000 pixels."""
    png = bytearray(encode_image(smooth_picture(0, 8, 8)))
    png[16:24] = (30_000).to_bytes(4, "big") * 2
    return bytes(png)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "an empty file"),
        (lambda: b"GIF89a but no more", "corrupt or empty image"),
        (lambda: b"<svg/>", "not a picture"),
        (lambda: b"\0\0\0\x18ftypheic", "HEIC pictures are not read"),
        (lambda: encode_image(smooth_picture(0, 8, 8))[:90], "corrupt or empty image"),
        (bomb, "expected a picture of at most 89,478,485 pixels, got 30000 x 30000"),
    ],
)
def test_what_is_no_picture_is_refused(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(make())


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "decode_pixels", None)
    monkeypatch.setattr(pictures_module, "convert", None)
    with pytest.raises(ValueError, match="30000 x 30000"):
        decode(bomb())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: at / "absent", "--data: expected a packed data set or a folder of pictures"),
        (lambda at: at, "--data: expected pictures, tars or Parquet files below .*, got none"),
        (lambda at: _write(at / "a.tar", b""), "pack it first, by m3i-fast data pack"),
        (lambda at: _write(at / "a.heic", b"x"), "1 left out: a.heic: HEIC pictures are not read"),
    ],
)
def test_a_place_without_pictures_is_named(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with open_pictures(make(tmp_path), None, tmp_path):
            raise AssertionError("opened")


def _write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file.parent


def test_a_split_that_is_not_there_is_named(packed: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of \['heldout', 'train'\], got 'tune'"):
        with open_pictures(packed, "tune", tmp_path):
            pass
    with pytest.raises(ValueError, match=r"--split: expected one of \['train'\], got 'tune'"):
        with open_pictures(folder, "tune", tmp_path):
            pass


@pytest.mark.parametrize("member", ["txt", "json"])
def test_captions_stored_as_text_are_read(member: str, tmp_path: Path) -> None:
    """As `data index` leaves them in tars that others wrote."""
    texts = ["a cat", "", "two dogs"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, text in enumerate(texts):
            stored = text if member == "txt" else json.dumps({"caption": text or None})
            files = {"png": encode_image(smooth_picture(i, 20, 20)), member: stored.encode()}
            for extension, content in files.items():
                entry = tarfile.TarInfo(f"{i}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    of = "txt" if member == "txt" else "json:caption"
    assert (
        main(["data", "index", str(tmp_path), "--caption-column", of, "--label-column", "none"])
        == 0
    )
    with open_pictures(tmp_path, None, tmp_path) as found:
        assert [found.about(row).captions for row in range(3)] == [("a cat",), (), ("two dogs",)]
        assert found.label.tolist() == [-1] * 3 and found.class_names == ()


def test_a_bucket_has_the_pictures_of_its_folder(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from tests.shared.pipelines.objects_below import put_all
    from tests.shared.pipelines.s3_server import S3Server, s3_environment

    server = S3Server()
    with s3_environment(server.address):
        make = urllib.request.Request(f"{server.address}/search", method="PUT")
        urllib.request.urlopen(make).close()
        put_all("s3://search/set", packed)
        bucket = Path("s3://search/set")  # as the command line has it
        with open_pictures(bucket, None, tmp_path / "a") as there:
            with open_pictures(packed, None, tmp_path / "b") as here:
                assert there.digest == here.digest
                for row in range(7):
                    assert there.read(row) == here.read(row)
                    assert there.about(row) == here.about(row)
        with pytest.raises(FileNotFoundError, match="s3://search/none"):
            with open_pictures(Path("s3://search/none"), None, tmp_path):
                pass
    server.close()
