"""Damaged tars, tables, indices and manifests: never a crash, nor a wrong sample taken silently."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import ROW, SampleTable
from m3i_fast.pipelines.dataset.verification.verify import find_faults
from m3i_fast.pipelines.indexing.tar_task import index_tar
from m3i_fast.pipelines.tar_members import sample_files
from tests.pipelines.indexing.tars import PNG, as_img2dataset, columns, write_tar
from tests.shared.pipelines.data import before_tables, edit_manifest, pack, sample

QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
FEW = settings(max_examples=40, deadline=None, suppress_health_check=QUIET)
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=QUIET)
Change = tuple[str, float, int]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "byte", "cut", "drop", "double", "size", "kind", "name"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**32),
    ),
    min_size=1,
    max_size=4,
)


@cache
def original(tar_format: int) -> bytes:
    """A tar of four samples, of which one has a name that takes headers of its own."""
    files = as_img2dataset(0, 3) + [("n" * 150 + ".png", PNG), ("n" * 150 + ".txt", b"long")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def changed(content: bytes, changes: list[Change]) -> bytes:
    """Bytes of a tar after some damage; that of a header has a right checksum."""
    for kind, where, value in changes:
        place = int(where * len(content))
        block = place // 512 * 512
        if kind == "flip" and content:
            content = (
                content[:place] + bytes([content[place] ^ 1 << value % 8]) + content[place + 1 :]
            )
        elif kind == "byte":
            content = content[:place] + bytes([value % 256]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "drop":
            content = content[:block] + content[block + 512 :]
        elif kind == "double":
            content = content[:block] + content[block : block + 512] + content[block:]
        else:
            content = _other_header(content, kind, value)
    return content


def _other_header(content: bytes, kind: str, value: int) -> bytes:
    blocks = [
        i for i in range(0, len(content) - 511, 512) if content[i + 257 : i + 262] == b"ustar"
    ]
    if not blocks:
        return content
    start = blocks[value % len(blocks)]
    header = bytearray(content[start : start + 512])
    if kind == "size":
        base256 = b"\x80" + (value << 20).to_bytes(11, "big"), b"\xff" * 12
        header[124:136] = (*base256, b"%011o\0" % value, b"%011o\0" % (value % 4096))[value % 4]
    elif kind == "kind":
        header[156] = b"0125LKxgSV7"[value % 11]
    else:
        header[0:20] = bytes((value >> i % 8) % 256 for i in range(20))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


def check_tar(file: Path, changes: list[Change], tar_format: int) -> None:
    """What an index takes is what tarfile reads there; the rest is refused by name."""
    file.write_bytes(changed(original(tar_format), changes))
    index = index_tar(file, file.name, columns(label=None))
    if file.read_bytes() != original(tar_format) and len(index.rows) < 4:
        assert index.refused or is_whole(file, len(index.rows))
    assert all(row["reason"] for row in index.refused)
    assert index.num_bytes == file.stat().st_size
    assert index.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    content = file.read_bytes()
    theirs = members_of(file) if len(index.rows) else {}
    for row in index.rows:
        found = content[row["offset"] :][: row["size"]]
        assert len(found) == row["size"] and google_crc32c.value(found) == row["crc32c"]
        key, files = sample_files(found)
        offsets = [at for at in theirs if row["offset"] <= at < row["offset"] + row["size"]]
        assert [theirs[at] for at in offsets] == [(f"{key}.{e}", files[e]) for e in files]


def is_whole(file: Path, num_pictures: int) -> bool:
    """Whether tarfile reads so many pictures and behind its last member nothing but zeros.

    A size that takes the files behind it for content of its own, to a block where another file
    begins or the end mark, leaves a tar in which nothing is wrong.
    """
    with tarfile.open(file, errors="surrogateescape") as tar:
        members = tar.getmembers()
    behind = max(member.offset_data + member.size for member in members)
    pictures = [member for member in members if member.name.endswith((".jpg", ".png"))]
    return len(pictures) == num_pictures and not any(file.read_bytes()[-(-behind // 512) * 512 :])


def members_of(file: Path) -> dict[int, tuple[str, bytes]]:
    """Name, its extension in lower case, and content of every file, by its place in the tar."""
    found = {}
    with tarfile.open(file, errors="surrogateescape") as tar:
        try:
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > file.stat().st_size:
                    break
                if member.isreg():
                    folder, dot, extension = member.name.partition(".")
                    opened = tar.extractfile(member)
                    assert opened is not None
                    found[member.offset] = folder + dot + extension.lower(), opened.read()
        except (tarfile.TarError, ValueError, EOFError, OSError, MemoryError):
            pass
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
CUTS = st.floats(0, 1, exclude_max=True).map(lambda where: [("cut", where, 0)])


@FEW
@given(changes=CHANGES | CUTS, tar_format=st.sampled_from([0, 1, 2]))
def test_damaged_tars(folder: Path, changes: list[Change], tar_format: int) -> None:
    if tar_format == 0:  # has no place for so long a name
        tar_format = tarfile.GNU_FORMAT
    check_tar(folder / "a.tar", changes, tar_format)


@pytest.mark.nightly
@MANY
@given(changes=CHANGES | CUTS, tar_format=st.sampled_from([1, 2]))
def test_a_thousand_damaged_tars(folder: Path, changes: list[Change], tar_format: int) -> None:
    check_tar(folder / "a.tar", changes, tar_format)


def test_a_tar_cut_at_any_block(folder: Path) -> None:
    whole = original(tarfile.PAX_FORMAT)
    for end in range(0, len(whole), 512):
        check_tar(folder / "a.tar", [("cut", (end + 0.5) / len(whole), 0)], tarfile.PAX_FORMAT)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "data"
    return pack(path, [sample(i, PNG) for i in range(6)], samples_per_shard=3)


@pytest.fixture(scope="module")
def old(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return before_tables(Path(shutil.copytree(good, tmp_path_factory.mktemp("old") / "data")))


def check_table(good: Path, content: bytes) -> None:
    """A reader that compares checksums gets samples that were packed, or an error."""
    right = np.fromfile(good / "train.samples", ROW)
    packed = set()
    for row in right:
        tar = (good / f"train-{row['shard']:06d}.tar").read_bytes()
        packed.add(tar[row["offset"] :][: row["size"]])
    with _replaced(good / "train.samples", content), _replaced(good / "manifest.json"):
        record = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        edit_manifest(good, lambda raw: raw["splits"]["train"]["table"].update(record))
        try:
            manifest, _ = open_split(good, "train")
            table = SampleTable.open(good, manifest, "train")
        except ValueError:
            return
        for row in table.rows:
            with (good / table.shard_files[row["shard"]]).open("rb") as tar:
                tar.seek(row["offset"])
                found = tar.read(row["size"])
            assert found in packed or google_crc32c.value(found) != row["crc32c"]
        find_faults(good)


class _replaced:  # noqa: N801
    """Puts a file back as it was."""

    def __init__(self, file: Path, content: bytes | None = None) -> None:
        self.file, self.before = file, file.read_bytes()
        if content is not None:
            file.write_bytes(content)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.file.write_bytes(self.before)


def damaged(kinds: list[str]) -> st.SearchStrategy[list[Change]]:
    change = st.tuples(
        st.sampled_from(kinds), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
    )
    return st.lists(change, min_size=1, max_size=4)


BYTES = damaged(["flip", "byte", "cut", "drop", "double"])
IN_PLACE = damaged(["flip", "byte"])


@FEW
@given(changes=IN_PLACE | BYTES)
def test_damaged_tables(good: Path, changes: list[Change]) -> None:
    check_table(good, changed((good / "train.samples").read_bytes(), changes))


@pytest.mark.nightly
@MANY
@given(changes=IN_PLACE | BYTES)
def test_a_thousand_damaged_tables(good: Path, changes: list[Change]) -> None:
    check_table(good, changed((good / "train.samples").read_bytes(), changes))


def check_index(old: Path, changes: list[Change]) -> None:
    """An index that was damaged is refused, or points to what it did."""
    index = old / "train-000000.idx"
    right = SampleTable.open(old, read_manifest(old), "train").rows
    content = changed(index.read_bytes(), changes)
    with _replaced(index, content), _replaced(old / "manifest.json"):
        record = {"index_bytes": len(content)}
        edit_manifest(old, lambda raw: raw["splits"]["train"]["shards"][0].update(record))
        try:
            manifest, _ = open_split(old, "train")
            found = SampleTable.open(old, manifest, "train").rows
        except ValueError:
            return
        # Of an optional file that the index leaves out nothing is known.
        for column in ("sample_id", "group_id", "label", "shard"):
            assert found[column].tolist() == right[column].tolist()


@FEW
@given(changes=BYTES)
def test_damaged_indices(old: Path, changes: list[Change]) -> None:
    check_index(old, changes)


@pytest.mark.nightly
@MANY
@given(changes=BYTES)
def test_a_thousand_damaged_indices(old: Path, changes: list[Change]) -> None:
    check_index(old, changes)


def _edits(value: Any) -> list[Callable[[Any], None]]:
    """A way to put something else into each place of a manifest."""
    places: list[Callable[[Any], None]] = []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        places.append(lambda new, key=key: value.__setitem__(key, new))  # type: ignore[misc]
        if isinstance(value[key], (dict, list)):
            places += _edits(value[key])
    return places


STRANGE = st.none() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just([])
ENTRIES = STRANGE | st.just({}) | st.just("/etc/x.tar")
PLACES = st.floats(0, 1, exclude_max=True)


def check_manifest(good: Path, content: bytes) -> None:
    """A manifest that was damaged is refused, or leads to samples that were packed."""
    right = np.fromfile(good / "train.samples", ROW)
    with _replaced(good / "manifest.json", content):
        try:
            manifest, _ = open_split(good, "train")
            table = SampleTable.open(good, manifest, "train")
            find_faults(good)
        except (ValueError, FileNotFoundError) as error:
            assert str(error)
            return
        assert (table.rows == right).all()
        assert list(table.shard_files) == [f"train-{i:06d}.tar" for i in range(2)]


def with_entry(good: Path, place: float, value: Any) -> bytes:
    raw = json.loads((good / "manifest.json").read_text())
    edits = _edits(raw)
    edits[int(place * len(edits))](value)
    return json.dumps(raw).encode()


@FEW
@given(place=PLACES, value=ENTRIES)
def test_strange_entries_of_manifests(good: Path, place: float, value: Any) -> None:
    check_manifest(good, with_entry(good, place, value))


@pytest.mark.nightly
@MANY
@given(place=PLACES, value=ENTRIES)
def test_a_thousand_strange_entries_of_manifests(good: Path, place: float, value: Any) -> None:
    check_manifest(good, with_entry(good, place, value))


@FEW
@given(changes=IN_PLACE | BYTES)
def test_damaged_manifests(good: Path, changes: list[Change]) -> None:
    check_manifest(good, changed((good / "manifest.json").read_bytes(), changes))


@pytest.mark.nightly
@MANY
@given(changes=IN_PLACE | BYTES)
def test_a_thousand_damaged_manifests(good: Path, changes: list[Change]) -> None:
    check_manifest(good, changed((good / "manifest.json").read_bytes(), changes))


def test_a_manifest_that_is_nested_without_end_is_refused(good: Path) -> None:
    check_manifest(good, b"[" * 10**6)


def test_a_tar_that_says_it_is_endless_ends(folder: Path) -> None:
    """A header of a size below 0 leads tarfile back to itself."""
    write_tar(folder / "b.tar", as_img2dataset(0, 2))
    content = bytearray((folder / "b.tar").read_bytes())
    content[124:136] = b"\xff" * 10 + b"\xfc\x00"
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    (folder / "b.tar").write_bytes(content)
    index = index_tar(folder / "b.tar", "b.tar", columns())
    assert len(index.rows) == 0 and "damaged or cut off" in index.refused[0]["reason"]
