"""What a reader needs of a data set in object storage before its samples: manifest and tables."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from m3i_fast.durable_files import make_directories, replaced_atomically, write_atomically
from m3i_fast.pipelines.dataset.annotations.columns import ColumnsInfo
from m3i_fast.pipelines.dataset.manifest import (
    MANIFEST_NAME,
    Manifest,
    TableInfo,
    read_manifest,
    sha256_file,
)
from m3i_fast.pipelines.storage.objects import PIECE, Bucket, ObjectInfo
from m3i_fast.pipelines.storage.requests import Stop, request_pool

_READS_IN_FLIGHT = 8


def copy_description(bucket: Bucket, cache_dir: Path, split: str) -> tuple[Path, Manifest]:
    """Copy the manifest and the tables of a split, and return their folder and the manifest.

    A data set is copied once, by one of the processes of a node. Raises as `copy_manifest` and
    `copy_table`.
    """
    folder, manifest = copy_manifest(bucket, cache_dir)
    for table in manifest.split(split).tables:  # every split has some, or `copy_manifest` raises
        copy_table(bucket, folder / table.file, table)
    return folder, manifest


def copy_manifest(bucket: Bucket, cache_dir: Path) -> tuple[Path, Manifest]:
    """Copy the manifest of a data set, and return its folder and the manifest.

    The folder is named by the URL and the manifest's bytes. Raises as `Bucket` does, and ValueError
    for a manifest that is none, or of a data set that cannot be read from a bucket.
    """
    content = bucket.read(MANIFEST_NAME)
    key = hashlib.sha256(bucket.url.encode() + b"\n" + content).hexdigest()[:16]
    folder = cache_dir / "sets" / key
    make_directories(folder)
    with _alone(folder):
        if not (folder / MANIFEST_NAME).is_file():
            write_atomically(folder / MANIFEST_NAME, content)
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"{bucket.url}/{MANIFEST_NAME}: {error}") from error
        if manifest.shards_in is not None:
            raise ValueError(
                f"{bucket.url}/{MANIFEST_NAME}: expected shards beside it, got shards_in "
                f"{manifest.shards_in}; upload with: m3i-fast data push"
            )
        for split, info in manifest.splits.items():
            if info.table is None:
                raise ValueError(
                    f"{bucket.url}: expected a table of the samples of split {split} (format "
                    "version 4), got none; pack the pictures again with this version and upload "
                    "them"
                )
    return folder, manifest


def copy_table(bucket: Bucket, file: Path, table: TableInfo | ColumnsInfo) -> None:
    """Copy a table of a split, unless it is there; one process of a node does.

    Raises as `Bucket` does, and ValueError where its size or digest is another.
    """
    with _alone(file.parent):
        # A file was renamed to its name after its digest was compared.
        if not file.is_file() or file.stat().st_size != table.num_bytes:
            _copy_table(bucket, file, table)


def _copy_table(bucket: Bucket, file: Path, table: TableInfo | ColumnsInfo) -> None:
    info = bucket.info(table.file)
    if info.size != table.num_bytes:
        raise ValueError(
            f"{bucket.url}/{table.file}: expected {table.num_bytes} bytes (manifest), "
            f"got {info.size}"
        )
    with replaced_atomically(file) as temporary:
        copy_object(bucket, table.file, info, temporary)
        got = sha256_file(temporary)
        if got != table.sha256:
            raise ValueError(
                f"{bucket.url}/{table.file}: expected sha256 {table.sha256} (manifest), got {got}; "
                "upload the data again (m3i-fast data push)"
            )


def copy_object(bucket: Bucket, name: str, info: ObjectInfo, file: Path) -> None:
    """Copy an object piece by piece into a new file; raises as `Bucket.read_range`."""
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:

        def copy(begin: int, stop: Stop) -> None:
            end = min(begin + PIECE, info.size)
            left = bucket.read_range(name, begin, end, expected=info, stop=stop)
            while len(left):
                written = os.pwrite(descriptor, left, begin)
                begin, left = begin + written, left[written:]

        with request_pool(_READS_IN_FLIGHT, "table-reader") as (pool, stop):
            for _ in pool.map(partial(copy, stop=stop), range(0, info.size, PIECE)):
                pass
    finally:
        os.close(descriptor)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time copy into a folder; the lock goes with the process."""
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
