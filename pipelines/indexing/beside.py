"""An index that is written beside the tars of a bucket, by way of a folder of this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from m3i_fast.durable_files import make_directories
from m3i_fast.pipelines.dataset.manifest import MANIFEST_NAME
from m3i_fast.pipelines.indexing.build import check_out
from m3i_fast.pipelines.storage.objects import Bucket, folder_of
from m3i_fast.pipelines.storage.upload import UPLOAD_POLICY, send_folder


def work_folder(url: str, cache_dir: Path) -> Path:
    """Make the folder in which an index of this URL is written, and goes on after a kill."""
    folder = folder_of(url, cache_dir, "indexing")
    make_directories(folder)
    return folder


def check_beside(url: str) -> None:
    """Raise ValueError where the URL holds a manifest that no index wrote; raises as `Bucket`."""
    try:
        content = Bucket(url).read(MANIFEST_NAME)
    except FileNotFoundError:
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, MANIFEST_NAME).write_bytes(content)
        check_out(Path(folder), url)


def publish(url: str, folder: Path) -> None:
    """Upload an index; a reader never finds a manifest beside the table of another."""
    bucket = Bucket(url, UPLOAD_POLICY)
    bucket.remove([MANIFEST_NAME])
    send_folder(bucket, folder)
