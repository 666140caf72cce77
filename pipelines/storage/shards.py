"""Where the bytes of samples lie: the shards of a data set on a local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.sample_table import SampleTable


class Shards(Protocol):
    """Finds the bytes of samples in local files; a backend reads them there."""

    def locate(self, table: SampleTable, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return (path of a local file, offset in it) of each sample of a batch.

        The bytes are there when it returns, and stay until the batch has been read. samples: [B]
        row numbers of the table.
        """


class LocalShards:
    """The shards in a dataset directory, which are read where they lie."""

    def __init__(self, path: Path, table: SampleTable) -> None:
        self._paths = [str(path / file) for file in table.shard_files]

    def locate(self, table: SampleTable, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return the shard and the offset in it of each sample."""
        rows = np.asarray(table.rows)
        shards, offsets = rows["shard"][samples].tolist(), rows["offset"][samples].tolist()
        return [(self._paths[s], offset) for s, offset in zip(shards, offsets, strict=True)]
