"""Where the bytes of samples lie: the shards of a data set on a local disk."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from m3i_fast.pipelines.dataset.sample_table import SampleTable


@dataclass(frozen=True, slots=True)
class BucketReads:
    """Hold what one process has read from object storage so far, and waited for."""

    read_bytes: int = 0
    requests: int = 0
    """Ranged requests for shards, repeated ones included."""
    retries: int = 0
    """Requests of any kind that were repeated."""
    cache_hits: int = 0
    """Clumps that lay in the local cache."""
    cache_bytes: int = 0
    """Bytes of these clumps."""
    wait_s: float = 0.0
    """Seconds in which a batch waited for its clumps."""

    def __add__(self, other: BucketReads) -> BucketReads:
        """Return the counts of both together."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return BucketReads(*(one + another for one, another in pairs))


class Shards(Protocol):
    """Finds the bytes of samples in local files; a backend reads them there."""

    def expect(self, samples: NDArray[np.int64]) -> None:
        """Take note of samples that will be located, in the order of their turn: [N] rows."""

    def expect_no_more(self) -> None:
        """Forget what was announced, since a run goes on elsewhere."""

    def locate(self, table: Any, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return (path of a local file, offset in it) of each sample of a batch.

        The bytes are there when it returns, and stay until the batch has been read. samples: [B]
        row numbers of the table, that of one data set or of all that are mixed.
        """

    def reads(self) -> BucketReads | None:
        """Return what was read from object storage so far; None where nothing is read from it."""

    def close(self) -> None:
        """Stop what fetches, and give back what is held."""


class LocalShards:
    """The shards in a dataset directory, which are read where they lie."""

    def __init__(self, path: Path, table: SampleTable) -> None:
        self._paths = [str(path / file) for file in table.shard_files]

    def expect(self, samples: NDArray[np.int64]) -> None:
        """Do nothing: all bytes are there."""

    def expect_no_more(self) -> None:
        """Do nothing, as `expect`."""

    def reads(self) -> None:
        """Return None: nothing is read from object storage."""

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def locate(self, table: SampleTable, samples: NDArray[np.int64]) -> list[tuple[str, int]]:
        """Return the shard and the offset in it of each sample."""
        rows = np.asarray(table.rows)
        shards, offsets = rows["shard"][samples].tolist(), rows["offset"][samples].tolist()
        return [(self._paths[s], offset) for s, offset in zip(shards, offsets, strict=True)]
