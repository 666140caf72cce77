"""Named columns: their file, both backends, mixtures, and what is refused and found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3i_fast.config.data import LoaderConfig
from m3i_fast.config.train import TrainConfig
from m3i_fast.engine.run.data_fields import columns_of
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.dataset.annotations.columns import ColumnInfo, rows_dtype, write_columns
from m3i_fast.pipelines.dataset.files import LocalFiles
from m3i_fast.pipelines.dataset.manifest import read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.samples import Sample
from m3i_fast.pipelines.dataset.verification.verify import find_faults, verify
from m3i_fast.pipelines.inspection.statistics import describe
from m3i_fast.pipelines.loader import Loader, evaluation_batches
from m3i_fast.pipelines.opened.mixture import MixedData
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote_files import opened_files
from m3i_fast.pipelines.storage.upload import push
from tests.shared.pipelines.data import (
    EVERYTHING,
    edit_manifest,
    encode_image,
    info,
    sample,
    smooth_picture,
)

COLUMNS = (
    ColumnInfo(name="genus", kind="class", names=("cat", "dog", "owl")),
    ColumnInfo(name="tags", kind="labels", names=("red", "big", "old", "new"), size=3),
    ColumnInfo(name="sizes", kind="numbers", names=("height", "weight"), size=2),
    ColumnInfo(name="alt", kind="text", size=12),
)
NUM = 18


def values_of(index: int) -> dict[str, Any]:
    """What is known of a sample; each column is missing of some."""
    values: dict[str, Any] = {
        "genus": index % 3,
        "tags": [(index + k) % 4 for k in range(index % 4)],
        "sizes": [index / 2, None if index % 3 else -float(index)],
        "alt": list(range(index + 1, index + 4)),
    }
    names = list(values)
    del values[names[index % 4]]
    return values


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    picture = encode_image(smooth_picture(0, 20, 28))
    samples = [sample(i, picture, columns=values_of(i)) for i in range(NUM)]
    return packed(tmp_path_factory.mktemp("columns") / "data", samples)


def packed(out: Path, samples: list[Sample], columns: tuple[ColumnInfo, ...] = COLUMNS) -> Path:
    about = info(columns=columns)
    return write_dataset(out, {"train": samples}, about, seed=0, samples_per_shard=5)


def expect_columns(batch: Batch, columns: tuple[ColumnInfo, ...] = COLUMNS) -> None:
    """The values of the samples of a batch, each as it was given to the packer."""
    assert list(batch.columns) == [column.name for column in columns]
    for row, number in enumerate(batch.sample_id.tolist()):
        values = values_of(number)
        assert batch.columns["genus"][row] == values.get("genus", -1)
        tags = values.get("tags", [-2] * 3)
        assert batch.columns["tags"][row].tolist() == tags + [-1] * (3 - len(tags))
        sizes = torch.tensor([np.nan if x is None else x for x in values.get("sizes", [None] * 2)])
        assert torch.equal(batch.columns["sizes"][row].nan_to_num(9e9), sizes.nan_to_num(9e9))
        alt = values.get("alt", [])
        assert batch.columns["alt"][row].tolist() == alt + [-1] * (12 - len(alt))
    kinds = {"genus": torch.int64, "tags": torch.int64, "sizes": torch.float32, "alt": torch.int32}
    assert {name: batch.columns[name].dtype for name in kinds} == kinds


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_batches_have_what_was_packed(path: Path, backend: str) -> None:
    cfg = LoaderConfig(path=path, batch_size=6, global_views=EVERYTHING, backend=backend)  # type: ignore[arg-type]
    loader = Loader(cfg)
    for _ in range(4):
        batch = next(loader)
        expect_columns(batch)
        moved = batch.to("cpu")
        assert all(
            torch.equal(moved.columns[n].nan_to_num(), v.nan_to_num())
            for n, v in batch.columns.items()
        )
        assert len(batch.tensors()) == 1 + 8 + len(COLUMNS) + 1
    loader.close()
    ordered = list(evaluation_batches(path, "train", image_size=16, batch_size=7, backend=backend))  # type: ignore[arg-type]
    assert sum(batch.batch_size for batch in ordered) == NUM
    for batch in ordered:
        expect_columns(batch)


def test_the_file_is_as_the_format_says(path: Path) -> None:
    raw = json.loads((path / "manifest.json").read_text())
    assert raw["format_version"] == 5
    dtype = [("genus", "<i4"), ("tags", "<i4", 3), ("sizes", "<f4", 2), ("alt", "<i4", 12)]
    rows = np.fromfile(path / "train.columns", dtype)
    table = np.fromfile(path / "train.samples", "<i8").reshape(NUM, 6)
    for row, number in zip(rows, table[:, 1].tolist(), strict=True):
        assert row["genus"] == values_of(number).get("genus", -1)
    recorded = raw["splits"]["train"]["columns"]
    counts = {
        n: sum(n in values_of(i) for i in range(NUM)) for n in ("genus", "tags", "sizes", "alt")
    }
    assert recorded["num_known"] == counts
    sizes = rows["sizes"].astype(np.float64)
    assert recorded["count"]["sizes"] == (~np.isnan(sizes)).sum(0).tolist()
    np.testing.assert_allclose(recorded["mean"]["sizes"], np.nanmean(sizes, 0), rtol=1e-12)
    np.testing.assert_allclose(recorded["std"]["sizes"], np.nanstd(sizes, 0), rtol=1e-12)


def test_numbers_far_from_zero_keep_their_deviation(tmp_path: Path) -> None:
    """Dates, one of which has an unknown number; in which parts they come does not matter."""
    column = ColumnInfo(name="date", kind="numbers", names=("year", "second"), size=2)
    dates = np.array([[2e7, 0.5], [2e7 + 2, np.nan], [2e7 + 4, 1.5], [2e7, 3.0], [2e7 + 2, 0.0]])
    rows = np.zeros(5, rows_dtype((column,)))
    rows["date"] = dates
    found = [
        write_columns(tmp_path / "train.columns", (column,), parts)
        for parts in ([rows[:2], rows[2:]], [rows], [rows[:0], rows[:1], rows[1:4], rows[4:]])
    ]
    info = found[0]
    assert found == [info] * 3 and info.count["date"] == (5, 4)
    np.testing.assert_allclose(info.mean["date"], np.nanmean(dates, 0), rtol=1e-12)
    np.testing.assert_allclose(info.std["date"], np.nanstd(dates, 0), rtol=1e-12)


def test_data_without_columns_are_as_before(tmp_path: Path) -> None:
    path = packed(tmp_path / "data", [sample(0, encode_image(smooth_picture(0, 9, 9)))], ())
    raw = json.loads((path / "manifest.json").read_text())
    assert raw["format_version"] == 4 and "columns" not in raw
    assert "columns" not in raw["splits"]["train"] and not (path / "train.columns").exists()
    assert read_manifest(path).columns == ()


def test_a_run_is_told_kinds_sizes_and_statistics(path: Path) -> None:
    cfg = replace(TrainConfig(), data=replace(TrainConfig().data, path=path))
    manifest = read_manifest(path)
    found = {column.name: column for column in columns_of(cfg, manifest)}
    assert [(c.kind, c.num_names, c.size) for c in found.values()] == [
        ("class", 3, 1), ("labels", 4, 3), ("numbers", 2, 2), ("text", 0, 12)
    ]  # fmt: skip
    info_of_split = manifest.split("train").columns
    assert info_of_split is not None
    assert found["sizes"].mean == info_of_split.mean["sizes"] and found["tags"].mean == ()


# ---- Mixtures ------------------------------------------------------------------------------------


def test_a_mixture_has_the_columns_of_all(path: Path, tmp_path: Path) -> None:
    """Names of both; what one data set lacks is missing there."""
    picture = encode_image(smooth_picture(1, 20, 28))
    theirs = (
        ColumnInfo(name="tags", kind="labels", names=("old", "blue"), size=1),
        ColumnInfo(name="genus", kind="class", names=("ant", "owl")),
        ColumnInfo(name="age", kind="numbers", names=("years",), size=1),
    )
    values = {"tags": [1], "genus": 1, "age": [7.0]}
    other = packed(
        tmp_path / "other", [sample(i, picture, columns=values) for i in range(6)], theirs
    )
    plain = packed(tmp_path / "plain", [sample(i, picture) for i in range(6)], ())
    parts = tuple(f"{where}:train:1" for where in (path, other, plain))
    cfg = LoaderConfig(mixture=parts, batch_size=9, global_views=EVERYTHING, backend="torch")
    mixed = MixedData.read(cfg)
    assert {column.name: (column.names, column.size) for column in mixed.columns} == {
        "genus": (("cat", "dog", "owl", "ant"), 1),
        "tags": (("red", "big", "old", "new", "blue"), 3),
        "sizes": (("height", "weight"), 2),
        "alt": ((), 12),
        "age": (("years",), 1),
    }
    loader, seen = Loader(cfg), set()
    for batch in (next(loader) for _ in range(3)):
        for row, number in enumerate(batch.sample_id.tolist()):
            of_set, number = divmod(number, 2**48)
            seen.add(of_set)
            genus, tags = batch.columns["genus"][row], batch.columns["tags"][row].tolist()
            if of_set == 0:
                found = values_of(number).get("tags", [-2, -2, -2])
                assert tags == found + [-1] * (3 - len(found))
                assert genus == values_of(number).get("genus", -1)
            else:
                assert (genus, tags) == ((2, [4, -1, -1]) if of_set == 1 else (-1, [-2, -2, -2]))
                assert batch.columns["sizes"][row].isnan().all()
                assert (batch.columns["alt"][row] == -1).all()
            assert batch.columns["age"][row].nan_to_num(-1) == (7 if of_set == 1 else -1)
    assert seen == {0, 1, 2}
    loader.close()


def test_columns_that_do_not_fit_together_are_refused(path: Path, tmp_path: Path) -> None:
    picture = encode_image(smooth_picture(1, 20, 28))
    wrong = {
        "numbers": ColumnInfo(name="sizes", kind="numbers", names=("height",), size=1),
        "class": ColumnInfo(name="sizes", kind="class", names=("a",)),
    }
    for name, column in wrong.items():
        other = packed(tmp_path / name, [sample(i, picture) for i in range(3)], (column,))
        parts = (f"{path}:train:1", f"{other}:train:1")
        with pytest.raises(ValueError, match="manifest.json: column sizes: expected"):
            MixedData.read(LoaderConfig(mixture=parts))


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"genus": 3}, r"genus: expected indices from 0 to 2"),
        ({"tags": [0, 0]}, r"tags: expected indices from 0 to 3, each once"),
        ({"tags": [0, 1, 2, 3]}, r"tags: expected 3 values, got 4"),
        ({"sizes": [1.0]}, r"sizes: expected 2 values, got 1"),
        ({"alt": [521]}, r"alt: expected ids below 521, got 521"),
        ({"colour": 1}, r"columns: expected names among .*, got \['colour'\]"),
    ],
)
def test_wrong_values_are_refused_while_packing(
    tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    picture = encode_image(smooth_picture(0, 9, 9))
    with pytest.raises(ValueError, match=f"sample picture-0: {told}"):
        packed(tmp_path / "data", [sample(0, picture, columns=values)])


def test_columns_that_are_none_are_refused() -> None:
    for facts, told in (
        ({"name": "1st", "kind": "class", "names": ("a",)}, "a name of up to 40 letters"),
        ({"name": "a", "kind": "class", "names": ("a", "a")}, "each name once"),
        ({"name": "a", "kind": "sort", "names": ("a",)}, "kind class, labels, numbers, text"),
        ({"name": "a", "kind": "text", "names": ("a",)}, "names of all but a text"),
        ({"name": "a", "kind": "labels"}, "names of all but a text"),
        ({"name": "a", "kind": "numbers", "names": ("a", "b")}, "size 2 to 2, got 1"),
    ):
        with pytest.raises(ValueError, match=told):
            ColumnInfo(**facts)  # type: ignore[arg-type]
    column = COLUMNS[0]
    assert column.row(np.int64(2)) == 2 and column.row(None) == -1
    with pytest.raises(ValueError, match="genus: expected 1 values, got 0"):
        column.row([])


def test_a_text_has_the_tokenizers_length(tmp_path: Path) -> None:
    picture = encode_image(smooth_picture(0, 9, 9))
    short = (ColumnInfo(name="alt", kind="text", size=11),)
    with pytest.raises(ValueError, match="column alt: expected size 12, .*got 11"):
        packed(tmp_path / "data", [sample(0, picture)], short)


@pytest.fixture
def copy(path: Path, tmp_path: Path) -> Path:
    out = tmp_path / "copy"
    out.mkdir()
    for file in path.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def _damage(path: Path, name: str, value: Any) -> None:
    """Write a value into row 4, with a digest that is right."""
    rows = np.fromfile(path / "train.columns", rows_dtype(COLUMNS))
    rows[name][4] = value
    rows.tofile(path / "train.columns")
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    edit_manifest(path, lambda raw: raw["splits"]["train"]["columns"].update(sha256=digest))


@pytest.mark.parametrize(
    ("name", "value"),
    [("genus", 3), ("tags", [0, -1, 1]), ("tags", [-2, 0, 0]), ("sizes", np.inf), ("alt", 521)],
)
def test_wrong_values_of_a_file_are_named(copy: Path, name: str, value: Any) -> None:
    _damage(copy, name, value)
    with pytest.raises(ValueError, match=rf"train.columns: row 4: {name}: expected"):
        Loader(LoaderConfig(path=copy, batch_size=4))
    assert any(f"row 4: {name}" in fault.reason for fault in find_faults(copy).faults)


def test_damage_is_found(copy: Path) -> None:
    content = bytearray((copy / "train.columns").read_bytes())
    content[5] ^= 1
    (copy / "train.columns").write_bytes(content)
    with pytest.raises(ValueError, match="train.columns: expected sha256"):
        Loader(LoaderConfig(path=copy, batch_size=4))
    with pytest.raises(ValueError, match="train.columns: expected sha256"):
        verify(copy)
    (copy / "train.columns").write_bytes(content[:-4])
    with pytest.raises(ValueError, match="train.columns: expected .* bytes"):
        Loader(LoaderConfig(path=copy, batch_size=4))
    (copy / "train.columns").unlink()
    with pytest.raises(FileNotFoundError, match="expected a file of columns, got none"):
        Loader(LoaderConfig(path=copy, batch_size=4))


def test_wrong_counts_are_found(copy: Path) -> None:
    def edit(raw: dict[str, Any]) -> None:
        raw["splits"]["train"]["columns"]["num_known"]["tags"] += 1

    edit_manifest(copy, edit)
    with pytest.raises(ValueError, match="expected num_known"):
        verify(copy)


def test_good_data_have_no_faults(path: Path) -> None:
    assert not find_faults(path, decode=True).faults
    found = describe(LocalFiles(path), "train", read=4)["columns"]
    assert [(c["column"], c["kind"], c["names"], c["known"]) for c in found] == [
        ("genus", "class", 3, 13), ("tags", "labels", 4, 13), ("sizes", "numbers", 2, 14),
        ("alt", "text", 0, 14),
    ]  # fmt: skip


# ---- In a bucket ---------------------------------------------------------------------------------


def test_a_bucket_has_the_columns_too(path: Path, url: str, tmp_path: Path) -> None:
    """Pushed, read and verified there; a damaged file is named."""
    push(path, url)
    cfg = LoaderConfig(path=Path(url), batch_size=6, cache_dir=tmp_path / "cache", backend="torch")
    loader = Loader(cfg)
    for _ in range(3):
        expect_columns(next(loader))
    loader.close()
    with opened_files(Path(url), tmp_path / "other") as files:
        assert not find_faults(files).faults
    bucket = Bucket(url)
    content = bytearray(bucket.read("train.columns"))
    content[5] ^= 1
    bucket.put("train.columns", bytes(content))
    with opened_files(Path(url), tmp_path / "third") as files:
        assert any("train.columns: expected sha256" in f.reason for f in find_faults(files).faults)
    with pytest.raises(ValueError, match="train.columns: expected sha256"):
        Loader(replace(cfg, cache_dir=tmp_path / "fourth"))
