"""Upload of what a data set consists of: shards and tables first, the manifest last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from m3i_fast.pipelines.dataset.manifest import (
    MANIFEST_NAME,
    REFUSED_NAME,
    Manifest,
    check_files,
    read_manifest,
    sha256_file,
)
from m3i_fast.pipelines.storage.objects import Bucket, RetryPolicy
from m3i_fast.pipelines.storage.requests import Stop, request_pool

logger = logging.getLogger(__name__)

UPLOADS_IN_FLIGHT = 4  # each sends a large file in several parts side by side
# A large shard is one request to us, though obstore sends it in parts.
UPLOAD_POLICY = RetryPolicy(request_s=600.0, give_up_s=1800.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Uploaded:
    """What an upload has sent, and what it has found there."""

    num_files: int
    num_bytes: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class File:
    """A file that is to become an object."""

    name: str
    path: Path
    num_bytes: int
    sha256: str


def push(
    directory: Path, url: str, *, tell: Callable[[str, int], object] | None = None
) -> Uploaded:
    """Upload a dataset directory, so that the URL can be given for its path.

    An object of the same size and noted digest is kept, so that an upload that was stopped goes on
    where it is started again. Every file is compared with its digest in the manifest before it is
    sent. The manifest comes last: a set that is not whole has none. tell: called with name and
    bytes of each file that is there. Raises as `Bucket` does, FileNotFoundError or ValueError for a
    file that is missing or damaged, and ValueError where the URL holds another data set.
    """
    manifest = read_manifest(directory)
    for split in manifest.splits.values():
        check_files(directory, manifest, split)
    bucket = Bucket(url, UPLOAD_POLICY)
    text = replace(manifest, shards_in=None).to_json().encode()
    _refuse_another(bucket, text)
    there = bucket.list() if bucket.scheme != "http" else {}

    def send_one(file: File, stop: Stop) -> int:
        found = there.get(file.name)
        may_be_there = found is not None and found.size == file.num_bytes
        sent = send(bucket, file, may_be_there=may_be_there, stop=stop)
        if tell is not None:
            tell(file.name, file.num_bytes)
        return sent

    with request_pool(UPLOADS_IN_FLIGHT, "uploader") as (pool, stop):
        sent = list(pool.map(partial(send_one, stop=stop), _files(directory, manifest)))
    bucket.put(MANIFEST_NAME, text)
    return Uploaded(
        num_files=sum(1 for size in sent if size >= 0) + 1,
        num_bytes=sum(size for size in sent if size >= 0) + len(text),
        num_kept=sum(1 for size in sent if size < 0),
    )


def _files(directory: Path, manifest: Manifest) -> Iterator[File]:
    """Yield the files of a data set, its manifest left out."""
    shards_in = manifest.shards_of(directory)
    for split in manifest.splits.values():
        for shard in split.shards:
            yield File(shard.file, shards_in / shard.file, shard.num_bytes, shard.sha256)
            if shard.index_bytes is not None and shard.index_sha256 is not None:
                index = shard.index_file
                yield File(index, directory / index, shard.index_bytes, shard.index_sha256)
        for table in split.tables:
            yield File(table.file, directory / table.file, table.num_bytes, table.sha256)
    refused = directory / REFUSED_NAME
    if refused.is_file():
        yield File(REFUSED_NAME, refused, refused.stat().st_size, sha256_file(refused))


def send(bucket: Bucket, file: File, *, may_be_there: bool, stop: Stop | None = None) -> int:
    """Upload a file; return its bytes, or -1 where an object of its size and digest is there.

    The file is compared with its digest before. stop: as of `Bucket.read_range`. Raises
    as `Bucket` does, and ValueError for a file that is damaged.
    """
    if may_be_there and _is_there(bucket, file, stop):
        return -1
    got = sha256_file(file.path)
    if got != file.sha256:
        raise ValueError(f"{file.path}: expected sha256 {file.sha256} (manifest), got {got}")
    bucket.put(file.name, file.path, sha256=file.sha256, stop=stop)
    return file.num_bytes


def _is_there(bucket: Bucket, file: File, stop: Stop | None) -> bool:
    try:
        info = bucket.info(file.name, stop=stop)
    except FileNotFoundError:
        return False
    return info.size == file.num_bytes and info.sha256 == file.sha256


def send_folder(bucket: Bucket, folder: Path) -> None:
    """Upload the files of a folder that describe a data set, the manifest last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_NAME):
        if path.is_file() and not path.name.startswith("."):
            bucket.put(path.name, path, sha256=sha256_file(path))


def _refuse_another(bucket: Bucket, text: bytes) -> None:
    """Raise ValueError where another data set lies under the URL: runs may be reading it."""
    try:
        found = bucket.read(MANIFEST_NAME)
    except FileNotFoundError:
        return
    if found != text:
        raise ValueError(
            f"{bucket.url}: expected no {MANIFEST_NAME}, or that of this data set, got another "
            "one; name another URL: runs that read it would stop at changed objects"
        )
