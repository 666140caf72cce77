"""Opening a data set to look at some of its samples: each is read alone, and not its clump."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.dataset.files import DatasetFiles, check_sizes
from m3i_fast.pipelines.dataset.sample_table import SampleTable
from m3i_fast.pipelines.opened.open_data import OpenSplit, open_data
from m3i_fast.pipelines.storage.objects import Bucket
from m3i_fast.pipelines.storage.remote import check_rows, described_in, shards_url
from m3i_fast.pipelines.storage.remote_files import RemoteFiles


class SingleSamples:
    """Finds samples in local files of one sample each, which are fetched where they are located.

    They stay until `close`.
    """

    def __init__(self, files: DatasetFiles) -> None:
        self._files = files
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def expect(self, samples: NDArray[np.int64]) -> None:
        """Do nothing: a few samples are fetched at their turn."""

    def expect_no_more(self) -> None:
        """Do nothing, as `expect`."""

    def locate(self, table: SampleTable, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return (path of a local file, 0) of each sample; raises as `Bucket` does."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="m3i-fast-samples-")
        paths = [Path(self._folder.name, str(number)) for number in samples.tolist()]
        missing = [i for i, path in enumerate(paths) if not path.exists()]
        contents = self._files.samples(table, table.at(samples[missing]))
        for i, content in zip(missing, contents, strict=True):
            paths[i].write_bytes(content)
        return [(str(path), 0) for path in paths]

    def reads(self) -> None:
        """Return None: nothing is counted of samples that are looked at."""

    def close(self) -> None:
        """Remove the files; the next samples are fetched again."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def open_few(cfg: LoaderConfig) -> OpenSplit:
    """Open a data set as `open_data`, but one in object storage without clumps and lanes.

    Its samples have the order of a folder, and each that is located costs a request. Raises as
    `open_data`.
    """
    url = shards_url(cfg.path)
    if url is None:
        return open_data(replace(cfg, mixture=()))
    folder, manifest = described_in(cfg.path, cfg.cache_dir.expanduser(), cfg.split)
    files = RemoteFiles(Bucket(url), folder, manifest, None)
    split = manifest.split(cfg.split)
    check_sizes(files, split)
    table = SampleTable.open(folder, manifest, cfg.split)
    check_rows(url, table, manifest, cfg.split)
    return OpenSplit(
        path=folder, manifest=manifest, split=split, table=table, shards=SingleSamples(files)
    )
