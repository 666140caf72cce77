"""m3i-fast data push: a finished data set is uploaded to object storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from m3i_fast.cli import console
from m3i_fast.terminal import progress_bar


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a dataset directory to s3://, gs:// or https://, the manifest last.

    The URL is then given for the path of a run: --data.path URL. Stopped and typed again, it keeps
    the files that are there. Credentials, region and endpoint come from AWS_* or GOOGLE_*.
    """

    path: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="DATASET")]]
    """Dataset directory."""
    url: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="URL")]]
    """Where to, as s3://bucket/folder."""

    def run(self) -> None:
        from m3i_fast.pipelines.dataset.manifest import read_manifest
        from m3i_fast.pipelines.storage.objects import url_of
        from m3i_fast.pipelines.storage.upload import push

        url = url_of(self.url)
        if url is None:
            raise ValueError(f"URL: expected s3://, gs:// or https://, got {self.url}")
        splits = read_manifest(self.path).splits.values()
        total = sum(shard.num_bytes for split in splits for shard in split.shards)
        with progress_bar("uploading", total, console=console, in_bytes=True) as update:
            sent = push(self.path, url, tell=lambda _, size: update(size))
        console.print(
            f"{url}: {sent.num_files} files sent ({sent.num_bytes:,} bytes), {sent.num_kept} were "
            f"there; train on it with: --data.path {url}",
            highlight=False,
            soft_wrap=True,
        )
