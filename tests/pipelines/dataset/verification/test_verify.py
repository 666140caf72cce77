"""Every byte of a data set is verified: what was changed is named, by its sample if it has one."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.files import LocalFiles
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.sample_table import ROW, SampleTable, write_table
from m3i_fast.pipelines.dataset.verification import verify as verify_module
from m3i_fast.pipelines.dataset.verification.verify import find_faults
from tests.shared.pipelines.data import (
    edit_manifest,
    encode_image,
    info,
    pack,
    sample,
    smooth_picture,
)

BAD = 5
PICTURE = encode_image(smooth_picture(0, 20, 30))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three shards, with a caption and a label each."""
    path = tmp_path_factory.mktemp("good") / "data"
    images = [encode_image(smooth_picture(i, 20, 30), "JPEG") for i in range(12)]
    return pack(path, [sample(i, image) for i, image in enumerate(images)])


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def flip(file: Path, offset: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= bit
    file.write_bytes(content)


def named(path: Path) -> list[str | None]:
    """The samples of all faults, and None for those that are of none."""
    return [fault.sample for fault in find_faults(path).faults]


def member(path: Path, extension: str) -> tuple[Path, tarfile.TarInfo]:
    table = SampleTable.open(path, read_manifest(path), "train")
    row = table.rows[table.rows["sample_id"] == BAD][0]
    file = path / table.shard_files[row["shard"]]
    with tarfile.open(file) as tar:
        name = next(n for n in tar.getnames() if n == f"{BAD:09d}-picture-{BAD}.{extension}")
        return file, tar.getmember(name)


PLACES = {
    "name": ("jpg", lambda m: m.offset + 2),
    "size": ("jpg", lambda m: m.offset + 130),
    "checksum": ("cls", lambda m: m.offset + 150),
    "kind": ("tok", lambda m: m.offset + 156),
    "end of header": ("tok", lambda m: m.offset + 511),
    "picture's header": ("jpg", lambda m: m.offset_data + 1),
    "picture": ("jpg", lambda m: m.offset_data + m.size // 2),
    "padding": ("jpg", lambda m: m.offset_data + m.size),
    "tokens": ("tok", lambda m: m.offset_data + 1),
    "label": ("cls", lambda m: m.offset_data),
    "id": ("sid", lambda m: m.offset_data + 7),
    "last padding": ("gid", lambda m: m.offset_data + 511),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_byte_that_was_changed_is_named_by_its_sample(copy: Path, place: str) -> None:
    extension, offset = PLACES[place]
    file, found = member(copy, extension)
    flip(file, offset(found), 0x80)
    of_sample, of_shard = find_faults(copy).faults
    assert (of_sample.where, of_sample.sample) == (file.name, str(BAD))
    assert f"{file.name}: sample {BAD} (" in of_sample.reason and "CRC-32C" in of_sample.reason
    assert of_shard.sample is None and f"{file.name}: expected sha256" in of_shard.reason


def test_bytes_after_the_samples_are_named_by_their_shard(copy: Path) -> None:
    file = copy / "train-000001.tar"
    flip(file, file.stat().st_size - 700)
    (fault,) = find_faults(copy).faults
    assert (fault.where, fault.sample) == (file.name, None)
    assert fault.reason.endswith("(bytes between or after samples)")


def flip_at_random(copy: Path, rng: np.random.Generator) -> None:
    """Changes a bit anywhere in a shard, and compares what is named with what it belongs to."""
    table = SampleTable.open(copy, read_manifest(copy), "train")
    shard = int(rng.integers(len(table.shard_files)))
    file = copy / table.shard_files[shard]
    place, bit = int(rng.integers(file.stat().st_size)), 1 << int(rng.integers(8))
    rows = table.rows
    inside = (rows["shard"] == shard) & (rows["offset"] <= place)
    inside &= place < rows["offset"] + rows["size"]
    flip(file, place, bit)
    assert named(copy) == [*(str(i) for i in rows["sample_id"][inside]), None], (file, place, bit)
    flip(file, place, bit)


def test_bits_that_were_changed_anywhere_are_named(copy: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(25):
        flip_at_random(copy, rng)
    assert named(copy) == []


@pytest.mark.nightly
def test_a_thousand_bits_that_were_changed_anywhere_are_named(copy: Path) -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        flip_at_random(copy, rng)


@pytest.mark.parametrize("column", ROW.names or ())
def test_a_row_that_was_changed_is_named(copy: Path, column: str) -> None:
    """By the table's digest, and by its sample where the tar says otherwise."""
    file = copy / "train.samples"
    rows = np.fromfile(file, ROW)
    number = int(np.flatnonzero(rows["sample_id"] == BAD)[0])
    field = (ROW.fields or {})[column]
    flip(file, number * ROW.itemsize + field[1], 2)
    faults = find_faults(copy).faults
    assert any("train.samples: expected sha256" in fault.reason for fault in faults)
    samples = [fault.sample for fault in faults if fault.sample]
    if column in ("crc32c", "label", "group_id"):
        assert samples == [str(BAD)]
    if column in ("offset", "size"):  # it may reach into the next one
        assert samples[0] == str(BAD)


def test_all_faults_are_listed(copy: Path) -> None:
    rows = SampleTable.open(copy, read_manifest(copy), "train").rows
    damaged = rows[[0, 2, 5]]
    for row in damaged:
        flip(copy / f"train-{row['shard']:06d}.tar", int(row["offset"]) + 600)
    assert named(copy) == [
        *map(str, damaged["sample_id"][:2]),
        None,
        str(rows[5]["sample_id"]),
        None,
    ]
    (copy / "train-000002.tar").unlink()
    faults = find_faults(copy).faults
    assert [fault.sample for fault in faults if fault.sample] == list(
        map(str, damaged["sample_id"])
    )
    assert "train-000002.tar: expected a shard, got none" in faults[0].reason


@pytest.mark.parametrize("change", ["num_labels", "num_captions", "num_groups", "max_captions"])
def test_a_wrong_count_is_named(copy: Path, change: str) -> None:
    def edit(raw: dict[str, dict[str, dict[str, int]]]) -> None:
        raw["splits"]["train"][change] += 1

    edit_manifest(copy, edit)
    faults = find_faults(copy).faults
    assert all(f"split train: expected {change}" in fault.reason for fault in faults) and faults


def test_the_command_lists_and_counts_them(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(copy)]) == 0
    assert "good" in capsys.readouterr().err
    for row in SampleTable.open(copy, read_manifest(copy), "train").rows[[1, 6, 9]]:
        flip(copy / f"train-{row['shard']:06d}.tar", int(row["offset"]) + 600)
    assert main(["data", "verify", str(copy), "--max-faults", "3"]) == 2
    said = capsys.readouterr().err
    assert "6 faults (3 not listed: --max-faults)" in said
    assert "copy the files again from where they came, or pack the pictures again" in said
    assert said.count("CRC-32C") == 2


def test_rows_out_of_the_order_of_shards_are_named(copy: Path) -> None:
    rows = np.fromfile(copy / "train.samples", ROW)
    last = rows["shard"].max()
    assert last > 0
    write_table(copy / "train.samples", [rows[::-1]])
    faults = [fault.reason for fault in find_faults(copy).faults]
    expected = f"shard: expected rows in the order of shards, got {last - 1} after {last}"
    assert any(expected in fault for fault in faults)


def test_ids_that_two_splits_share_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first block of ids or a later one."""
    monkeypatch.setattr(verify_module, "BLOCK", 2)
    samples = {"train": [0, 1, 2, 3, 4], "heldout": [10, 11, 12]}
    made = {name: [sample(i, PICTURE) for i in ids] for name, ids in samples.items()}
    path = tmp_path / "data"
    write_dataset(path, made, info(), seed=0, samples_per_shard=9)
    files = LocalFiles(path)
    assert list(verify_module._check_ids(files)) == []
    rows = np.fromfile(path / "heldout.samples", ROW)
    rows["sample_id"][2], rows["group_id"][1] = 3, 4
    write_table(path / "heldout.samples", [rows])
    strange, twice = verify_module._check_ids(files)
    assert twice.sample == "3" and "got 3 twice" in twice.reason
    assert "expected the sample_id of a sample of split heldout, got 4" in strange.reason
    rows["sample_id"][:2] = 10
    write_table(path / "heldout.samples", [rows])
    assert "got 10 twice" in next(verify_module._check_ids(files)).reason
