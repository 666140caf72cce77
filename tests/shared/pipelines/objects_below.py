"""What lies below a URL, put there and read back by obstore alone."""

from __future__ import annotations

from pathlib import Path

from m3i_fast.pipelines.storage.objects import Bucket, RetryPolicy

POLICY = RetryPolicy(request_s=20.0, first_wait_s=0.01, longest_wait_s=0.1)


def objects(url: str) -> dict[str, bytes]:
    """Content by name, hidden objects too."""
    bucket = Bucket(url, POLICY)
    return {name: bucket.read(name) for name in bucket.list()}


def put_all(url: str, folder: Path) -> None:
    """Put every file of a folder."""
    bucket = Bucket(url, POLICY)
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.put(file.relative_to(folder).as_posix(), file.read_bytes())
