"""Indices of earlier formats are looked at when a data set is opened, before they are believed."""

from __future__ import annotations

import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from wds2idx import IndexCreator

from m3i_fast.config.data import LoaderConfig, ViewConfig
from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from tests.shared.pipelines.data import (
    Components,
    Packer,
    before_tables,
    edit_manifest,
    encode_image,
    pack,
    record,
    repack,
    sample,
    several_captions,
    smooth_picture,
)

CFG = LoaderConfig(batch_size=4, global_views=ViewConfig(count=1, size=4, gray_probability=0))
PICTURE = smooth_picture(0, 40, 56)
PNG, JPEG, GIF = (encode_image(PICTURE, name) for name in ("PNG", "JPEG", "GIF"))
BAD = "000000005-picture-5"


def bomb(height: int, width: int) -> bytes:
    """The header of a PNG of one bit a pixel, and no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures in one shard."""
    path = tmp_path_factory.mktemp("good") / "data"
    return before_tables(pack(path, [sample(i, PNG) for i in range(8)], samples_per_shard=8))


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def expect_refusal(path: Path, message: str) -> None:
    """Opening for training and for evaluation and verifying all say it, and what to do."""
    restore = ".*; copy the files again from where they came"
    with pytest.raises(ValueError, match=message + restore):
        Loader(replace(CFG, path=path))
    with pytest.raises(ValueError, match=message + restore):
        evaluation_batches(path, "train", image_size=4, batch_size=4)
    with pytest.raises(ValueError, match=message):
        verify(path)


def test_what_a_packer_wrote_is_opened(good: Path) -> None:
    verify(good, decode=True)
    assert next(Loader(replace(CFG, path=good))).batch_size == 4


# An index that lies: in the row of the sample, this field of this component is another.
FIELDS = {"extension": 0, "offset": 1, "size": 2, "name": 3}
LIES = [
    ("png", "size", 10**9, rf"{BAD}.png: expected content .* within the 81920 bytes of the tar"),
    ("png", "size", 10**14, rf"{BAD}.png: expected content .*, got 100000000000000 bytes"),
    ("png", "size", 2**64, rf"{BAD}.png: expected content"),
    ("png", "size", 50, rf"{BAD}.png: expected a file of 50 bytes at .*'{BAD}.png' of \d+ bytes"),
    ("png", "size", -1, r"row \d: expected EXTENSION OFFSET SIZE NAME .*, got 'png \d+ -1 "),
    ("png", "size", "1_0", r"row \d: expected EXTENSION OFFSET SIZE NAME"),
    ("png", "offset", 10**6 * 512, rf"{BAD}.png: expected content .* at 512000000"),
    ("png", "offset", 513, rf"{BAD}.png: expected content at a multiple of 512"),
    ("png", "offset", 0, rf"{BAD}.png: expected content at a multiple of 512"),
    ("png", "offset", 1024, rf"{BAD}.png: expected a file's header at 512 of the tar, got none"),
    ("png", "offset", 512, rf"{BAD}.png: expected a file of \d+ bytes at 512 of the tar, got '0"),
    ("cls", "size", 4, rf"{BAD}.cls: expected 8 bytes, got 4"),
    ("sid", "size", 16, rf"{BAD}.sid: expected 8 bytes, got 16"),
    ("gid", "size", 0, rf"{BAD}.gid: expected 8 bytes, got 0"),
    ("gid", "name", f"{BAD}.sid", rf"sample {BAD}: expected {BAD}.gid, got {BAD}.sid"),
    ("gid", "name", "two words.gid", r"row \d: expected EXTENSION OFFSET SIZE NAME"),
    ("cls", "extension", "klass", rf"sample {BAD}: expected a component cls, got png, tok, klass"),
    ("tok", "extension", "cls", rf"sample {BAD}: expected each component once, got png, cls, cls"),
    (
        "png",
        "extension",
        "gif",
        r"expected one image \(jpg or .* webp\), got gif, tok, cls, sid, gid",
    ),
    (
        "tok",
        "extension",
        "jpg",
        rf"sample {BAD}: expected one image \(jpg or .*\), got png, jpg",
    ),
]


@pytest.mark.parametrize(("component", "field", "value", "message"), LIES)
def test_an_index_that_lies_is_named(
    copy: Path, component: str, field: str, value: object, message: str
) -> None:
    """Some of these ended in a SIGSEGV of DALI, others in a text without the sample's name."""
    index = copy / "train-000000.idx"
    rows = [row.split(" ") for row in index.read_text().splitlines()]
    (row,) = (row for row in rows if row[-1].startswith(BAD))
    place = row.index(component) + FIELDS[field]
    row[place] = str(value)
    index.write_text("\n".join(map(" ".join, rows)) + "\n")
    record(copy)
    expect_refusal(copy, rf"train-000000\.(idx|tar): .*{message}")


def test_offsets_of_two_components_that_are_exchanged_are_named(copy: Path) -> None:
    """Of one size each: labels would be ids."""
    index = copy / "train-000000.idx"
    rows = [row.split(" ") for row in index.read_text().splitlines()]
    (row,) = (row for row in rows if row[-1].startswith(BAD))
    first, second = row.index("cls") + 1, row.index("gid") + 1
    row[first], row[second] = row[second], row[first]
    index.write_text("\n".join(map(" ".join, rows)) + "\n")
    record(copy)
    expect_refusal(copy, rf"train-000000.tar: {BAD}.cls: expected .* got '{BAD}.gid' of 8 bytes")


@pytest.mark.parametrize("header", ["v1.2 20", "v1.2 3", "v1.2 1000000000000", "v1.1 8", "", "v9"])
def test_an_index_of_another_count_or_version_is_named(copy: Path, header: str) -> None:
    index = copy / "train-000000.idx"
    index.write_text("\n".join([header, *index.read_text().splitlines()[1:]]) + "\n")
    record(copy)
    expect_refusal(copy, rf"train-000000.idx: expected 'v1.2 8' .*, got '{header}' and 8 rows")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0garbage" * 9, b"v1.2 8\n" + b"\n" * 8])
def test_an_index_that_is_none_is_named(copy: Path, content: bytes) -> None:
    (copy / "train-000000.idx").write_bytes(content)
    record(copy)
    expect_refusal(copy, "train-000000.idx: (row 1: )?expected ")


def test_a_member_that_is_no_file_is_named(copy: Path) -> None:
    """A link to a file of the reader's machine has content where the next member's header is."""
    tar = copy / "train-000000.tar"
    with tarfile.open(tar) as old:
        place = next(m.offset for m in old if m.name == f"{BAD}.gid")
    with tar.open("r+b") as file:
        file.seek(place + 156)
        file.write(tarfile.SYMTYPE)
    record(copy)
    expect_refusal(copy, rf"train-000000.tar: {BAD}.gid: expected a file .* type b'2'")


def with_bad(path: Path, change: Callable[[Components], Components]) -> None:
    repack(path, lambda i, found: change(found) if i == 5 else found)


CONTENTS = [
    (b"", r"corrupt or empty image: expected PNG, JPEG or WebP data, got b''"),
    (b"<html>not found</html>", "expected PNG, JPEG or WebP data, got b'<html>no'"),
    (GIF, "expected PNG, JPEG or WebP data, got b'GIF8"),
    (JPEG, "expected png, got JPEG data"),
    (PNG[:20], r"corrupt or empty image: expected PNG, JPEG or WebP data, got b'\\x89PNG"),
    (bomb(30_000, 30_000), "expected at most 89478485 pixels, got 30000 x 30000 = 900000000"),
    (bomb(9_460, 9_460), "expected at most 89478485 pixels, got 9460 x 9460 = 89491600"),
    (bomb(0, 7), "corrupt or empty image: 0 x 7 pixels"),
]


@pytest.mark.parametrize(("content", "message"), CONTENTS)
def test_a_picture_that_is_none_is_named(copy: Path, content: bytes, message: str) -> None:
    """Index, tar and digests are right."""
    with_bad(copy, lambda found: found | {"png": content})
    expect_refusal(copy, rf"train-000000.tar: {BAD}.png: .*{message}")


@pytest.mark.parametrize("missing", ["png", "cls", "sid", "gid"])
def test_a_missing_component_is_named(copy: Path, missing: str) -> None:
    with_bad(copy, lambda found: {k: v for k, v in found.items() if k != missing})
    expect_refusal(copy, rf"train-000000.idx: sample {BAD}: expected (one image|a component)")


def test_a_picture_of_another_extension_is_named(copy: Path) -> None:
    with_bad(copy, lambda found: {"gif" if k == "png" else k: v for k, v in found.items()})
    expect_refusal(copy, rf"train-000000.idx: sample {BAD}: expected one image .*, got gif, tok")


def test_components_of_no_use_are_left_alone(copy: Path) -> None:
    """As in shards of other packers."""
    with_bad(copy, lambda found: found | {"json": b"{}", "seg.png": GIF})
    verify(copy, decode=True)
    found = evaluation_batches(copy, "train", image_size=4, batch_size=8)
    assert sorted(next(found).sample_id.tolist()) == list(range(8))


def longer(key: str) -> str:
    return f"{key}-{'long' * 40}"


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_other_packers_are_read(packer: Packer, tar_format: int) -> None:
    """They stand in a header before the member's own, which has their first 100 bytes."""
    path = packer([sample(i, PNG) for i in range(4)])
    repack(path, lambda _, found: found, rename=longer, tar_format=tar_format)
    verify(path)
    assert next(Loader(replace(CFG, path=path))).batch_size == 4


def test_an_index_that_dalis_tool_makes_of_long_gnu_names_is_refused(packer: Packer) -> None:
    """Its offsets are those of the names, which would be decoded as pictures."""
    path = before_tables(packer([sample(i, PNG) for i in range(4)]))
    repack(path, lambda _, found: found, rename=longer, tar_format=tarfile.GNU_FORMAT)
    tar = path / "train-000000.tar"
    with IndexCreator(str(tar), str(tar.with_suffix(".idx")), verbose=False) as creator:
        creator.create_index()
    record(path)
    expect_refusal(path, r"train-000000.tar: .*png: expected a file .* got '././@LongLink'")


@pytest.mark.parametrize("read", ["train", "evaluate", "verify"])
def test_the_limit_of_pixels_can_be_changed(good: Path, read: str) -> None:
    def look(max_pixels: int) -> None:
        if read == "train":
            next(Loader(replace(CFG, path=good, max_pixels=max_pixels)))
        elif read == "evaluate":
            settings = {"image_size": 4, "batch_size": 4, "max_pixels": max_pixels}
            evaluation_batches(good, "train", **settings)
        else:
            verify(good, max_pixels=max_pixels)

    look(40 * 56)
    refused = r"picture-\d.png: expected at most 2239 pixels, got 40 x 56 = 2240; raise max_pixels"
    with pytest.raises(ValueError, match=refused):
        look(40 * 56 - 1)


def test_a_limit_of_no_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="max_pixels: expected 1 to 2147483647, got 0"):
        replace(CFG, max_pixels=0)


def test_more_captions_than_there_are_is_named(packer: Packer) -> None:
    """Batches would have room for that many: gigabytes."""
    path = before_tables(packer([sample(i, PNG, captions=several_captions(3)) for i in range(4)]))
    edit_manifest(path, lambda raw: raw["splits"]["train"].update(max_captions=10**9))
    expect_refusal(path, r"split train: expected max_captions 1000000000 \(manifest\), got 3")


@pytest.mark.parametrize("lies", ["index", "tar"])
def test_ranks_share_the_shards(lies: str, fifty: Path, tmp_path: Path) -> None:
    path = before_tables(Path(shutil.copytree(fifty, tmp_path / "copy")))
    index = path / "train-000004.idx"
    if lies == "index":
        index.write_text(index.read_text().replace(" 8 ", " 9 ", 1))
        record(path, 4)
        message = "train-000004.idx: .*expected 8 bytes, got 9"
    else:
        repack(path, lambda _, found: found | {"png": GIF}, shard=4)
        message = "train-000004.tar: .*got b'GIF8"
    for rank in (0, 2):
        open_split(path, "train", rank=rank, num_ranks=3)
    with pytest.raises(ValueError, match=message):
        open_split(path, "train", rank=4 % 3, num_ranks=3)


def test_opening_reads_a_small_part_of_the_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photographs, beside which headers, labels and captions are small."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = encode_image(noise, "JPEG", quality=95)
    path = pack(tmp_path / "data", [sample(i, image) for i in range(12)])
    right, read = os.pread, 0

    def counted(file: int, count: int, place: int) -> bytes:
        nonlocal read
        found = right(file, count, place)
        read += len(found)
        return found

    monkeypatch.setattr(os, "pread", counted)
    manifest, split = open_split(path, "train")
    assert manifest == read_manifest(path)
    assert 0 < read < 0.05 * sum(shard.num_bytes for shard in split.shards)
