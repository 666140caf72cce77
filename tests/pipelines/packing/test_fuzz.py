"""Damaged pictures, tables and tars: no crash, no hang, and nothing wrong is taken silently."""

from __future__ import annotations

import csv
import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from m3i_fast.pipelines.dataset.pictures import decode
from m3i_fast.pipelines.packing.conversion import convert
from m3i_fast.pipelines.packing.items import Refused
from tests.pipelines.packing.helpers import pack_with, picture, put, rows_of
from tests.shared.pipelines.data import smooth_picture

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=1000)
MAX_PIXELS = 10_000


def make_seeds() -> list[bytes]:
    image = Image.fromarray(smooth_picture(0, 24, 32))
    alpha = image.copy()
    alpha.putalpha(image.convert("L"))
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "JPEG", {}),
        (image, "JPEG", {"progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {}),
        (alpha, "PNG", {}),
        (image.quantize(9), "PNG", {}),
        (image, "GIF", {}),
        (image, "WEBP", {}),
        (alpha, "WEBP", {"lossless": True}),
        (image, "BMP", {}),
        (image, "TIFF", {"compression": "tiff_lzw"}),
        (image, "ICO", {"sizes": [(16, 16)]}),
        (image, "PPM", {}),
    ]
    contents = []
    for made, image_format, options in kinds:
        content = io.BytesIO()
        made.save(content, image_format, **options)
        contents.append(content.getvalue())
    return contents


SEEDS = make_seeds()


@st.composite
def damaged(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """Cut, flip, repeat or insert bytes of one of them; at times nothing."""
    raw = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(raw) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "set"]))
        if kind == "cut":
            del raw[place:]
        elif kind == "insert":
            raw[place:place] = draw(st.binary(max_size=20))
        elif kind == "repeat":
            raw[place:place] = raw[place : place + draw(st.integers(0, 600))]
        elif raw:
            place = min(place, len(raw) - 1)
            raw[place] = draw(st.integers(0, 255)) if kind == "set" else raw[place] ^ 0xFF
    return bytes(raw)


def check_picture(content: bytes) -> None:
    """What is taken decodes by the loader's rule, to the pixels that Pillow reads strictly."""
    try:
        found = convert(content, max_pixels=MAX_PIXELS)
    except Refused as refused:
        assert refused.reason and refused.what_to_do
        return
    assert decode(found.content, found.extension, MAX_PIXELS) == found.size
    assert found.change or found.content == content
    if found.extension == "png" and not ImageFile.LOAD_TRUNCATED_IMAGES and not found.change:
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB"))
        with Image.open(io.BytesIO(found.content)) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), expected)


@settings(QUICK, max_examples=300)
@given(damaged(SEEDS))
def test_damaged_pictures(content: bytes) -> None:
    check_picture(content)


@pytest.mark.nightly
@LONG
@given(damaged(SEEDS))
def test_a_thousand_damaged_pictures(content: bytes) -> None:
    check_picture(content)


# ---- Tables --------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.sampled_from(["a.png", "b.png", "c.png", "../a.png", "/etc/hostname", "", "0", "-1", "7"]),
    st.text(max_size=8),
)
HEADERS = ["file", "caption", "label", "group", "split", "x"]


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes]:
    """Name and content of a table that Python's csv writes, with damage at times."""
    suffix = draw(st.sampled_from([".csv", ".tsv"]))
    header = draw(st.lists(st.sampled_from(HEADERS), min_size=1, max_size=5))
    rows = draw(st.lists(st.lists(CELLS, min_size=1, max_size=6), max_size=8))
    out = io.StringIO(newline="")
    writer = csv.writer(
        out,
        delimiter="\t" if suffix == ".tsv" else ",",
        escapechar="\\" if draw(st.booleans()) else None,
    )
    writer.writerow(header)
    for row in rows:
        writer.writerow(row)
    content = out.getvalue().encode("utf-8", "surrogatepass")
    return f"t{suffix}", draw(damaged([content]))


def check_table(table: tuple[str, bytes]) -> None:
    """Each picture that is taken is one that the table names, in its folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        contents = {put(root, f"{c}.png").read_bytes() for c in "abc"}
        try:
            packed = pack_with(put(root, *table), root / "out")
        except ValueError as error:
            assert str(error)
            return
        for split in packed.manifest.splits:
            rows = rows_of(root / "out", split)
            assert {row.image for row in rows} <= contents
            assert len({row.image for row in rows}) == len(rows)
        assert all(r.file and r.reason and r.what_to_do for r in packed.refused)


@settings(QUICK, max_examples=40)
@given(tables())
def test_damaged_tables(table: tuple[str, bytes]) -> None:
    check_table(table)


@pytest.mark.nightly
@settings(LONG, max_examples=2000)
@given(tables())
def test_two_thousand_damaged_tables(table: tuple[str, bytes]) -> None:
    check_table(table)


ANIMALS = ("heron", "badger", "walrus", "cricket")


def make_parquets() -> list[bytes]:
    """Tables of pictures' bytes or paths, with a checksum of each page."""
    arrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
    bytes_of = [picture(i) for i in range(len(ANIMALS))]
    paths = [f"{animal}.png" for animal in ANIMALS]
    made = []
    for pictures in (bytes_of, paths):
        for compression in ("none", "snappy", "zstd"):
            out = io.BytesIO()
            columns = {"image": pictures, "caption": ANIMALS, "label": list(range(len(ANIMALS)))}
            parquet.write_table(
                arrow.table(columns),
                out,
                compression=compression,
                row_group_size=3,
                write_page_checksum=True,
            )
            made.append(out.getvalue())
    return made


def check_parquet(table: bytes) -> None:
    """Each picture that is taken has the caption and the label that were written with it."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        facts = {}
        for i, animal in enumerate(ANIMALS):
            facts[put(root, f"{animal}.png", picture(i)).read_bytes()] = ((animal,), i)
        try:
            packed = pack_with(put(root, "t.parquet", table), root / "out")
        except ValueError as error:
            assert str(error)
            return
        for row in rows_of(root / "out"):
            captions, label = facts[row.image]
            assert row.captions in (captions, ()) and row.label in (label, -1)
        assert all(r.file and r.reason and r.what_to_do for r in packed.refused)


@settings(QUICK, max_examples=40)
@given(st.data())
def test_damaged_parquets(data: st.DataObject) -> None:
    check_parquet(data.draw(damaged(make_parquets())))


@pytest.mark.nightly
@LONG
@given(st.data())
def test_a_thousand_damaged_parquets(data: st.DataObject) -> None:
    check_parquet(data.draw(damaged(make_parquets())))


# ---- Tars ----------------------------------------------------------------------------------------


def make_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i, animal in enumerate(ANIMALS):
            said = animal.encode()
            members = {"png": picture(i), "txt": said, "json": b'{"a": 1}', "cls": said}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{i}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue().rstrip(b"\0") + bytes(1024)


TAR = make_tar()


def check_tar(content: bytes) -> None:
    """A picture that is taken has no caption or class of another one, whatever is damaged."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        try:
            packed = pack_with(put(root, "t.tar", content), root / "out")
        except ValueError as error:
            assert str(error)
            return
        rows = rows_of(root / "out")
        if content == TAR:
            assert len(rows) == 4 and not packed.refused
        assert len(rows) + len(packed.refused) >= 1
        assert all(r.file and r.reason and r.what_to_do for r in packed.refused)
        pictures = [picture(i) for i in range(len(ANIMALS))]
        for row in rows:
            assert row.image in pictures  # a PNG has checksums
            others = {a for i, a in enumerate(ANIMALS) if pictures[i] != row.image}
            assert not others & set(row.captions)
            assert row.label < 0 or packed.manifest.class_names[row.label] not in others


@settings(QUICK, max_examples=40)
@given(damaged([TAR]))
def test_damaged_tars(content: bytes) -> None:
    check_tar(content)


@pytest.mark.nightly
@LONG
@given(damaged([TAR]))
def test_a_thousand_damaged_tars(content: bytes) -> None:
    check_tar(content)
