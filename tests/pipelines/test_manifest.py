"""Reading a manifest back, and naming what is wrong with a directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from m3i_fast.pipelines.manifest import check_files, read_manifest
from m3i_fast.pipelines.verify import verify


@pytest.fixture
def copy(fifty: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fifty, tmp_path / "copy"))


def test_missing_directory_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="m3i-fast data openmoji .*nowhere"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"format": "m3i-fast-shards"}'])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json is not a manifest.*m3i-fast data openmoji"):
        read_manifest(tmp_path)


def test_another_format_version_is_refused(copy: Path) -> None:
    raw = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**raw, "format_version": 3}))
    with pytest.raises(ValueError, match=r"expected a format of .*1\).*2\).*, got .*3\)"):
        read_manifest(copy)


def test_digest_stands_for_every_byte(copy: Path) -> None:
    manifest = read_manifest(copy)
    raw = json.loads((copy / "manifest.json").read_text())
    raw["splits"]["train"]["shards"][3]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(raw))
    assert read_manifest(copy).digest != manifest.digest


@pytest.mark.parametrize("name", ["train-000002.tar", "train-000002.idx"])
def test_missing_short_and_damaged_files_are_named(copy: Path, name: str) -> None:
    split = read_manifest(copy).splits["train"]
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    check_files(copy, split)  # sizes are right; only reading every byte can tell
    with pytest.raises(ValueError, match=f"{name}: expected sha256 .* got"):
        verify(copy)
    (copy / name).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name}: expected {len(content)} bytes, got"):
        check_files(copy, split)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"shard missing: .*{name}.*m3i-fast data"):
        check_files(copy, split)
