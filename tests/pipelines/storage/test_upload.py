"""A data set is uploaded whole, goes on where it was stopped, and is opened from its URL."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME, read_manifest
from m3i_fast.pipelines.storage.dataset_copy import copy_description
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.upload import push
from tests.pipelines.storage.packed import POLICY, table_of, write
from tests.shared.pipelines.s3_server import S3Server, refuse


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("packed") / "data")


def puts(server: S3Server) -> list[str]:
    return [name for name in server.requests if name.startswith("PUT")]


def test_a_set_is_opened_from_its_url(
    path: Path, url: str, server: S3Server, tmp_path: Path
) -> None:
    told: list[str] = []
    sent = push(path, url, tell=lambda name, _: told.append(name))
    files = sorted(f.name for f in path.iterdir() if not f.name.startswith("."))
    assert sorted([*told, MANIFEST_NAME]) == sorted(Bucket(url).list()) == files
    assert sent.num_bytes == sum(f.stat().st_size for f in path.iterdir())
    assert puts(server)[-1] == f"PUT {MANIFEST_NAME}"
    server.clear()
    folder, manifest = copy_description(Bucket(url, POLICY), tmp_path, "train")
    assert manifest == read_manifest(path) and manifest.digest == read_manifest(path).digest
    assert (table_of(folder).rows == table_of(path).rows).all()
    first = dict(server.requests)
    copy_description(Bucket(url, POLICY), tmp_path, "train")
    # The second reads the manifest, to see that it is the same, and nothing else.
    assert sum(server.requests.values()) == sum(first.values()) + 1


def test_an_upload_that_was_stopped_goes_on(path: Path, url: str, server: S3Server) -> None:
    server.fault("000002.tar", refuse("403 Forbidden", "AccessDenied"), 10)
    with pytest.raises(PermissionError, match=r"000002.tar \(put\): refused.*AccessDenied"):
        push(path, url)
    assert MANIFEST_NAME not in Bucket(url).list()
    server.clear()
    again = push(path, url)
    assert again.num_kept >= 2 and f"PUT {MANIFEST_NAME}" in puts(server)
    assert len(puts(server)) == again.num_files
    server.clear()
    assert push(path, url).num_files == 1  # the manifest
    # An object of the same size, and other bytes, is sent again.
    tar = table_of(path).shard_files[0]
    Bucket(url).put(tar, bytes((path / tar).stat().st_size), sha256="other")
    assert push(path, url).num_files == 2
    assert Bucket(url).read(tar) == (path / tar).read_bytes()


def test_damaged_files_and_other_sets_are_refused(
    path: Path, url: str, server: S3Server, tmp_path: Path
) -> None:
    damaged = shutil.copytree(path, tmp_path / "damaged")
    tar = damaged / table_of(path).shard_files[1]
    content = bytearray(tar.read_bytes())
    content[5_000] ^= 1
    tar.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tar.name}: expected sha256 .* \(manifest\), got"):
        push(damaged, url)
    assert MANIFEST_NAME not in Bucket(url).list()
    push(path, url)
    other = shutil.copytree(path, tmp_path / "other")
    manifest = (other / MANIFEST_NAME).read_text()
    (other / MANIFEST_NAME).write_text(manifest.replace('"licence": "', '"licence": "another '))
    with pytest.raises(ValueError, match="got another one; name another URL"):
        push(other, url)


def test_a_table_that_does_not_fit_its_manifest_is_refused(
    path: Path, url: str, server: S3Server, tmp_path: Path
) -> None:
    push(path, url)
    table = read_manifest(path).split("train").table
    assert table is not None
    bucket = Bucket(url, POLICY)
    content = bytearray(bucket.read(table.file))
    content[40] ^= 1
    bucket.put(table.file, bytes(content))
    with pytest.raises(ValueError, match=rf"{table.file}: expected sha256 {table.sha256}"):
        copy_description(bucket, tmp_path, "train")
    bucket.put(table.file, bytes(content[:-48]))
    with pytest.raises(ValueError, match=rf"{table.file}: expected {table.num_bytes} bytes"):
        copy_description(bucket, tmp_path, "train")
    assert not list(tmp_path.rglob("*.samples"))
    bucket.put(table.file, path / table.file)
    folders: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: folders.append(
                copy_description(Bucket(url, POLICY), tmp_path, "train")[0]
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1
    assert (table_of(folders[0]).rows == table_of(path).rows).all()
