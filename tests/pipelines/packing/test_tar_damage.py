"""Tars that are damaged, joined, linked or made to exhaust memory, plain and compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.pipelines.packing.helpers import labels_of, pack_with, picture, put, refused_of, rows_of
from tests.shared.pipelines.data import encode_image

MODES = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}
COMPRESSED = [suffix for suffix in MODES if suffix != "tar"]


def write_tar(file: Path, contents: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, MODES[file.name.split(".", 1)[1]]) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


@pytest.mark.parametrize("suffix", MODES)
def test_two_tars_in_one_file_are_refused_behind_the_first(tmp_path: Path, suffix: str) -> None:
    parts = [
        write_tar(tmp_path / f"{n}.{suffix}", {f"{n}{i}.png": picture(i) for i in range(3)})
        for n in "ab"
    ]
    file = put(tmp_path, f"both.{suffix}", b"".join(part.read_bytes() for part in parts))
    found = refused_of(pack_with(file, tmp_path / "out"))
    assert list(found) == [f"both.{suffix}", f"both.{suffix}:a2"]
    assert "damaged after a2.png" in found[f"both.{suffix}"]
    assert len(rows_of(tmp_path / "out")) == 2


@pytest.mark.parametrize("suffix", MODES)
@pytest.mark.parametrize("place", [0, 100, 511, 512])
def test_a_sample_whose_last_files_were_cut_off_is_refused(
    tmp_path: Path, suffix: str, place: int
) -> None:
    """Which would be packed without its caption and class."""
    contents = {}
    for i in range(2):
        contents |= {f"{i}.png": picture(i), f"{i}.txt": b"a word", f"{i}.cls": b"0"}
    raw = write_tar(tmp_path / "whole.tar", contents).read_bytes()
    raw = raw[: raw.index(b"1.txt") + place]
    compress = {"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
    file = put(tmp_path, f"t.{suffix}", compress.get(suffix, bytes)(raw))
    found = refused_of(pack_with(file, tmp_path / "out"))
    assert list(found) == [file.name, f"{file.name}:1"]
    assert found[f"{file.name}:1"] == f"may lack files: its tar is {found[file.name]}"
    assert [row.captions for row in rows_of(tmp_path / "out")] == [("a word",)]


@pytest.mark.parametrize("suffix", MODES)
def test_a_header_of_8_gib_is_not_allocated(tmp_path: Path, suffix: str) -> None:
    pictures = {"a.png": picture(0), "b.png": picture(1)}
    good = write_tar(tmp_path / "good.tar", pictures).read_bytes()
    end = sum(512 + -(-len(content) // 512) * 512 for content in pictures.values())
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 8 << 30
    raw = good[:end] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 25)
    file = put(tmp_path, "plain.tar", raw)
    if suffix != "tar":
        compress = {"tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
        file = put(tmp_path, f"b.{suffix}", compress[suffix](raw))
    found = refused_of(pack_with(file, tmp_path / "out"))
    assert "expected a header of at most" in found[file.name]
    assert len(rows_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("damage", ["cut", "changed"])
@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_compressed_tar_that_is_damaged_in_a_picture_is_refused_by_name(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    rng = random.Random(0)
    noise = [encode_noise(rng) for _ in range(8)]
    names = {f"{i}.png": content for i, content in enumerate(noise)}
    file = write_tar(tmp_path / f"t.{suffix}", names)
    put(tmp_path / "source", f"t.{suffix}", file.read_bytes())
    write_tar(tmp_path / "source" / "whole.tar", {"w.png": picture(0)})
    raw = bytearray(file.read_bytes())
    middle = len(raw) * 2 // 3
    if damage == "cut":
        raw = raw[:middle]
    else:
        raw[middle : middle + 50] = rng.randbytes(50)
    put(tmp_path / "source", f"t.{suffix}", bytes(raw))
    packed = pack_with(tmp_path / "source", tmp_path / "out")
    assert "damaged after" in refused_of(packed)[f"t.{suffix}"]
    kept = [row.image for row in rows_of(tmp_path / "out")]
    assert kept[-1] == picture(0) and set(kept[:-1]) <= set(noise)


def encode_noise(rng: random.Random) -> bytes:
    pixels = np.frombuffer(rng.randbytes(100 * 100 * 3), np.uint8).reshape(100, 100, 3)
    return encode_image(pixels, "PNG")


def test_a_class_of_eight_letters_is_text(tmp_path: Path) -> None:
    names = ["airplane", "elephant", "cat"]
    contents = {}
    for i, name in enumerate(names):
        contents |= {f"{i}.png": picture(i), f"{i}.cls": name.encode()}
    packed = pack_with(write_tar(tmp_path / "t.tar", contents), tmp_path / "out")
    assert not packed.refused and labels_of(tmp_path / "out") == names


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_links_to_files_of_many_pictures_are_not_followed_out_of_the_source(
    tmp_path: Path, kind: str
) -> None:
    def write(file: Path, seed: int) -> None:
        if kind == "tar":
            write_tar(file, {f"{seed}.png": picture(seed)})
        else:
            parquet.write_table(pyarrow.table({"image": [picture(seed)]}), file)

    source = tmp_path / "source"
    (source / "folder").mkdir(parents=True)
    (source / f"called like one.{kind}").mkdir()
    write(source / f"in.{kind}", 0)
    write(tmp_path / f"elsewhere.{kind}", 1)
    (source / f"out.{kind}").symlink_to(tmp_path / f"elsewhere.{kind}")
    (source / f"none.{kind}").symlink_to("nowhere")
    found = refused_of(pack_with(source, tmp_path / "out"))
    assert found == {
        f"none.{kind}": "a symbolic link to a file that is not there",
        f"out.{kind}": "a symbolic link out of the source's folder",
    }
    assert [row.image for row in rows_of(tmp_path / "out")] == [picture(0)]
    allowed = pack_with(source, tmp_path / "allowed", allow_outside=True)
    assert list(refused_of(allowed)) == [f"none.{kind}"]
    assert len(rows_of(tmp_path / "allowed")) == 2
    pack_with(source / f"out.{kind}", tmp_path / "named")  # by the user
