"""A table that does not fit its tars is refused when it is opened, in a time that does not grow."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m3i_fast.pipelines.dataset import directory
from m3i_fast.pipelines.dataset.directory import open_split
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.sample_table import ROW, Rows, SampleTable, write_table
from tests.shared.pipelines.data import edit_manifest, encode_image, pack, sample, smooth_picture

PNG = encode_image(smooth_picture(0, 20, 30))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures in two shards."""
    path = tmp_path_factory.mktemp("good") / "data"
    return pack(path, [sample(i, PNG) for i in range(8)])


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def rewrite(path: Path, change: Callable[[Rows], object]) -> None:
    """Changes rows and brings the manifest up to date, as a program that does it wrong."""
    rows = np.fromfile(path / "train.samples", ROW)
    change(rows)
    (path / "train.samples").write_bytes(rows.tobytes())
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    edit_manifest(path, lambda raw: raw["splits"]["train"]["table"].update(sha256=digest))


LIES: list[tuple[str, Any, str]] = [
    ("shard", 2, "shard: expected a number below 2, got 2"),
    ("offset", 511, "offset: expected a multiple of 512, got 511"),
    ("offset", -512, "offset: expected a multiple of 512, got -512"),
    ("offset", 512, "expected an uncompressed tar|expected the files of one sample|damaged"),
    ("offset", 1 << 40, "size: expected an end within the tar"),
    ("size", 0, "size: expected a multiple of 512 above 0, got 0"),
    ("size", 1 << 30, "size: expected an end within the tar, got 1073741824"),
    ("size", 1024, "expected the files of a sample|ends within 1024|expected one image"),
    ("label", 3, "label: expected -1 to 2, got 3"),
    ("label", -2, "label: expected -1 to 2, got -2"),
    ("sample_id", -1, "sample_id: expected at least 0, got -1"),
    ("group_id", -5, "group_id: expected at least 0, got -5"),
    ("flags", 4, "flags: expected at most 3, got 4"),
    ("zero", 1, "zero: expected 0, got 1"),
]


@pytest.mark.parametrize(("column", "value", "message"), LIES)
def test_a_row_that_lies_is_named(copy: Path, column: str, value: Any, message: str) -> None:
    def lie(rows: Rows) -> None:
        rows[column][5] = value

    rewrite(copy, lie)
    with pytest.raises(
        ValueError, match=rf"(row 5: |sample \d at byte \d+: ).*({message}).*; copy"
    ):
        open_split(copy, "train")


def test_rows_of_two_samples_at_once_are_named(copy: Path) -> None:
    def join(rows: Rows) -> None:
        rows["size"][5] += rows["size"][6]

    rewrite(copy, join)
    with pytest.raises(ValueError, match="expected the files of one sample, got '00000000"):
        open_split(copy, "train")


def test_tars_of_other_samples_are_refused(copy: Path, tmp_path: Path) -> None:
    """Of the same size: of an earlier packing, say."""
    tar = copy / "train-000001.tar"
    size = tar.stat().st_size
    tar.write_bytes(np.random.default_rng(0).bytes(size))
    with pytest.raises(ValueError, match="train-000001.tar: sample .*expected an uncompressed tar"):
        open_split(copy, "train")


@pytest.mark.parametrize("change", ["short", "long", "other", "gone", "count"])
def test_a_table_of_another_size_or_digest_is_refused(copy: Path, change: str) -> None:
    file = copy / "train.samples"
    content = file.read_bytes()
    if change == "gone":
        file.unlink()
    elif change == "count":
        edit_manifest(copy, lambda raw: raw["splits"]["train"]["table"].update(num_bytes=48))
        file.write_bytes(content[:48])
    else:
        changed = {"short": content[:-48], "long": content * 2, "other": bytes(len(content))}
        file.write_bytes(changed[change])
    messages = {"gone": "expected a table, got none", "count": "of 8 samples"}
    expected = messages.get(change, "train.samples: expected (384 bytes|sha256)")
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        open_split(copy, "train")


def test_rows_are_mapped_and_not_written(good: Path) -> None:
    table = SampleTable.open(good, read_manifest(good), "train")
    assert isinstance(table.rows, np.memmap) and not table.rows.flags.writeable


@pytest.mark.parametrize("num_samples", [40, 4000])
def test_opening_a_large_table_reads_as_much_as_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_samples: int
) -> None:
    """The rows are the same ones again and again, which only verifying would find."""
    path = pack(tmp_path / "data", [sample(i, PNG) for i in range(40)], samples_per_shard=40)
    rows = np.tile(np.fromfile(path / "train.samples", ROW), num_samples // 40)
    table = write_table(path / "train.samples", [rows])

    def edit(raw: Any) -> None:
        split = raw["splits"]["train"]
        split["num_samples"] = split["shards"][0]["num_samples"] = num_samples
        split["table"] = {"file": table.file, "num_bytes": table.num_bytes, "sha256": table.sha256}

    edit_manifest(path, edit)
    monkeypatch.setattr(directory, "HASHED_BYTES", 0)
    monkeypatch.setattr(directory, "COMPARED", 20)
    right, reads = os.pread, 0

    def counted(*arguments: int) -> bytes:
        nonlocal reads
        reads += 1
        return right(*arguments)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(directory, "sha256_file", lambda file: pytest.fail(f"read {file}"))
    open_split(path, "train")
    assert 20 * 5 <= reads <= 20 * 16


def test_ranks_share_what_is_compared(copy: Path) -> None:
    def lie(rows: Rows) -> None:
        rows["offset"][5] = 512

    rewrite(copy, lie)
    refused = 0
    for rank in range(3):
        try:
            open_split(copy, "train", rank=rank, num_ranks=3)
        except ValueError as error:
            refused += 1
            assert "at byte 512" in str(error)
    assert refused == 1
