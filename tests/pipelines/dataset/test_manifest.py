"""Reading a manifest back, and naming what is wrong with a directory and what to do about it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m3i_fast.cli import main
from m3i_fast.pipelines.dataset.manifest import check_files, is_dataset, read_manifest
from m3i_fast.pipelines.dataset.pack import write_dataset
from m3i_fast.pipelines.dataset.verification.verify import verify
from m3i_fast.pipelines.loader import evaluation_batches
from m3i_fast.recipes import pack_demo
from tests.shared.pipelines.data import (
    before_tables,
    edit_manifest,
    encode_image,
    info,
    sample,
    smooth_picture,
)

PNG = encode_image(smooth_picture(0, 20, 30))


@pytest.fixture
def copy(fifty: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fifty, tmp_path / "copy"))


def hint(path: Path) -> str:
    with pytest.raises((FileNotFoundError, ValueError)) as refused:
        read_manifest(path)
    return str(refused.value)


def test_what_to_type_for_a_missing_directory_makes_the_demos_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint's command does what `m3i-fast demo` does, and goes where the hint says."""
    called: list[dict[str, Any]] = []

    def build(out: Path, **options: Any) -> Path:
        called.append({"out": out, **options})
        return out

    missing = tmp_path / "no where"
    command = shlex.split(hint(missing).partition("by: m3i-fast ")[2])
    monkeypatch.setattr("m3i_fast.pipelines.sources.openmoji.build", build)
    assert main(command) == 0
    pack_demo(missing)
    typed, packed = called
    assert typed["out"] == missing
    assert {key: typed[key] for key in packed} == packed


@pytest.mark.parametrize("content", [None, "not json", '{"format": "coco"}', "[" * 100_000])
def test_nobody_is_told_to_write_into_a_folder_of_their_own(
    tmp_path: Path, content: str | None
) -> None:
    mine = tmp_path / "mypics"
    mine.mkdir()
    (mine / "holiday.png").write_bytes(PNG)
    if content is not None:
        (mine / "manifest.json").write_text(content)
    said = hint(mine)
    assert str(mine) in said and f"data openmoji {mine}" not in said
    assert said.endswith(f"m3i-fast data pack {mine} {mine}-packed")
    assert not is_dataset(mine)


def test_a_file_is_no_directory_to_write_to(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(PNG)
    assert hint(file).endswith(f"m3i-fast data pack {file} {file}-packed")


@pytest.mark.parametrize("name", ["mine", "openmoji"])
def test_what_to_do_where_a_shard_is_missing_fits_the_data(tmp_path: Path, name: str) -> None:
    """Pictures of one's own are not replaced by drawings, drawings come by their own settings."""
    out = write_dataset(
        tmp_path / "my data",
        {"train": [sample(0, PNG)]},
        info(name=name),
        seed=0,
        samples_per_shard=1,
    )
    (out / "train-000000.tar").unlink()
    with pytest.raises(
        FileNotFoundError, match="train-000000.tar: expected a shard, got none"
    ) as refused:
        evaluation_batches(out, "train", image_size=8, batch_size=1)
    said = str(refused.value)
    assert ("copy the files again" in said) == (name == "mine")
    assert (f"m3i-fast data openmoji '{out}'" in said) == (name == "openmoji")
    assert ("settings in manifest.json" in said) == (name == "openmoji")


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"format": "m3i-fast-shards"}', "\ud800"])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match="manifest.json is not a manifest.*m3i-fast data pack"):
        read_manifest(tmp_path)


def test_another_format_version_is_refused(copy: Path) -> None:
    edit_manifest(copy, lambda raw: raw.update(format_version=7))
    with pytest.raises(ValueError, match=r"expected a format of .*1\).*6\).*, got .*7\); .*update"):
        read_manifest(copy)


def train(raw: dict[str, Any]) -> Any:
    return raw["splits"]["train"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.pop("tokenizer"), "tokenizer"),
        (lambda raw: raw.update(tokenizer=None), r"manifest\.tokenizer"),
        (lambda raw: raw.update(splits={}), "splits: expected at least one, got none"),
        (lambda raw: raw.update(splits=["train"]), r"manifest\.splits"),
        (lambda raw: raw.update(splits={"train": 7}), r"splits\['train'\]"),
        (lambda raw: raw.update(class_names=["a", 7]), r"expected str, got 7 .*class_names\[1\]"),
        (lambda raw: raw.update(max_image_size=[1]), "max_image_size"),
        (lambda raw: raw.update(colour="red"), "colour"),
        (lambda raw: train(raw).update(shards=3), r"splits\['train'\]\.shards"),
        (lambda raw: train(raw).update(shards=[]), "num_samples: expected 0, the sum of"),
        (lambda raw: train(raw).update(num_samples=49), "num_samples: expected 50, the sum of"),
        (lambda raw: train(raw).pop("num_captions"), "num_captions"),
        (lambda raw: train(raw)["shards"][1].update(num_bytes="9"), "expected int, got '9'"),
        (lambda raw: train(raw)["shards"][1].update(num_bytes=9.5), "expected int, got 9.5"),
        (lambda raw: train(raw)["shards"][1].update(num_samples=0), "at least 1, got 0"),
        (lambda raw: train(raw)["shards"][1].pop("sha256"), r"shards\[1\]\.sha256"),
    ],
)
def test_a_wrong_entry_of_a_manifest_is_named(
    copy: Path, edit: Callable[[Any], object], message: str
) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(ValueError, match=f"copy/manifest.json: .*({message})"):
        read_manifest(copy)


@pytest.mark.parametrize(
    "file", ["../fifty/train-000001.tar", "{}/train-000001.tar", "a/../../x.tar", "train.idx", ""]
)
def test_a_shard_outside_of_the_directory_is_refused(copy: Path, fifty: Path, file: str) -> None:
    """Though there is such a file, whose digest is right."""
    edit_manifest(copy, lambda raw: train(raw)["shards"][1].update(file=file.format(fifty)))
    refused = r"expected a \.tar inside of the dataset directory, got"
    for read in (read_manifest, verify):
        with pytest.raises(ValueError, match=rf"{refused} .*shards\[1\]"):
            read(copy)


def test_shards_may_stand_in_folders_of_the_directory(copy: Path) -> None:
    (copy / "part").mkdir()
    for file in copy.glob("train-000001.*"):
        file.rename(copy / "part" / f"1{file.suffix}")
    edit_manifest(copy, lambda raw: train(raw)["shards"][1].update(file="part/1.tar"))
    verify(copy)
    assert sum(b.batch_size for b in evaluation_batches(copy, "train", image_size=8, batch_size=50))


def test_digest_stands_for_every_byte(copy: Path) -> None:
    manifest = read_manifest(copy)
    edit_manifest(copy, lambda raw: train(raw)["shards"][3].update(sha256="0" * 64))
    assert read_manifest(copy).digest != manifest.digest


@pytest.mark.parametrize("name", ["train-000002.tar", "train-000002.idx"])
def test_missing_short_and_damaged_files_are_named(copy: Path, name: str) -> None:
    if name.endswith(".idx"):
        before_tables(copy)
    manifest = read_manifest(copy)
    split = manifest.splits["train"]
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    check_files(copy, manifest, split)  # sizes are right; only reading every byte can tell
    with pytest.raises(ValueError, match=f"{name}: expected sha256 .* got"):
        verify(copy)
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name}: expected {len(content)} bytes, got"):
        check_files(copy, manifest, split)
    (copy / name).unlink()
    missing = f"{name}: expected a shard, got none; copy the files again"
    with pytest.raises(FileNotFoundError, match=missing):
        check_files(copy, manifest, split)
